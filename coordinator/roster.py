"""The roster: one public key file per enrolled device, ``{device}.pub``, in ``roster/``.

``fedtide enrol`` adds a file, and removing one revokes; a running coordinator notices either within a second.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedtide.wire import ids
from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import DeviceId
from fedtide.wire.signatures import PublicKey

_LOOK_AGAIN_S: Final = 1.0
_COARSEST_TICK_NS: Final = 2_000_000_000
"""Of a file system's clock. Of two changes in one tick only the first shows in a file's times."""


class RosterFull(Exception):
    """More devices than ``max_devices``."""


class KeyConflict(Exception):
    """A device that is enrolled already, with another key."""


@dataclass(frozen=True, slots=True)
class _File:
    """A key file as it was read.

    Attributes:
        stamp: its modification time in nanoseconds, its size and its inode.
        key: what it held; None: no key.
        settled: whether a later change would show in the stamp.
    """

    stamp: tuple[int, int, int]
    key: PublicKey | None
    settled: bool


class Roster:
    """Enrolled devices and their keys.

    Args:
        directory: holds ``{device}.pub`` files.
        max_devices: at most so many are enrolled.
        clock: seconds that only grow.
    """

    def __init__(
        self, directory: Path, max_devices: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = directory
        self._max_devices = max_devices
        self._clock = clock
        self._files: dict[DeviceId, _File] = {}
        self._keys: dict[DeviceId, PublicKey] = {}
        self._looked_at = float("-inf")
        self._modified: int | None = None
        self._settled = False

    def key(self, device: DeviceId) -> PublicKey | None:
        """The device's public key, or None if it is not enrolled."""
        self._refresh()
        return self._keys.get(device)

    def devices(self) -> tuple[DeviceId, ...]:
        """All enrolled devices, sorted."""
        self._refresh()
        return tuple(sorted(self._keys))

    def __len__(self) -> int:
        self._refresh()
        return len(self._keys)

    def enrol(self, device: DeviceId, key: PublicKey) -> None:
        """Add a device.

        Raises:
            KeyConflict: it is enrolled with another key.
            RosterFull: there is no room.
        """
        self._refresh()
        known = _read_key(self._file(device))
        if known == key:
            self._keys[device] = key
            return
        if known is not None:
            raise KeyConflict(
                f"device {device} is enrolled with key {known}; remove {self._file(device)} to replace it"
            )
        self._keys.pop(device, None)  # its file was removed since the last look
        if len(self._keys) >= self._max_devices:
            raise RosterFull(f"{len(self._keys)} devices are enrolled; max_devices is {self._max_devices}")
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file(device).write_text(f"{key}\n")
        self._keys[device] = key

    def _file(self, device: DeviceId) -> Path:
        return self._directory / f"{device}.pub"

    def _refresh(self) -> None:
        moment = self._clock()
        if moment - self._looked_at < _LOOK_AGAIN_S:
            return
        self._looked_at = moment
        try:
            modified = self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            self._files, self._keys, self._modified = {}, {}, None
            return
        unchanged = modified == self._modified
        if unchanged and self._settled:
            return
        # A file may have been half written when it was read, and two changes in one tick of the file system's
        # clock look like one: so what is as new as the clock is read once more at the next look.
        self._files = dict(self._read_files(modified, last=unchanged))
        self._keys = {name: file.key for name, file in self._files.items() if file.key is not None}
        self._modified, self._settled = modified, unchanged

    def _read_files(self, modified: int, *, last: bool) -> Iterator[tuple[DeviceId, _File]]:
        """All files with names of devices; only what may have changed is read.

        Args:
            modified: the directory's modification time in nanoseconds.
            last: nothing has changed since the last look, so what is read now holds.
        """
        found = dict(_stamps(self._directory))
        newest = max([modified, *(stamp[0] for stamp in found.values())])
        for name, stamp in found.items():
            known = self._files.get(name)
            if known is not None and known.settled and known.stamp == stamp:
                yield name, known
            else:
                settled = last or stamp[0] < newest - _COARSEST_TICK_NS
                yield name, _File(stamp, _read_key(self._file(name)), settled)


def _stamps(directory: Path) -> Iterator[tuple[DeviceId, tuple[int, int, int]]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            stem, _, suffix = entry.name.rpartition(".")
            if suffix != "pub":
                continue
            try:
                name, found = ids.device_id(stem), entry.stat()
            except (MalformedId, FileNotFoundError):
                continue
            yield name, (found.st_mtime_ns, found.st_size, found.st_ino)


def _read_key(file: Path) -> PublicKey | None:
    """What a file holds; None: it is not there, half written, or no key. So the device stays unknown."""
    try:
        return PublicKey.load(file)
    except (ValueError, FileNotFoundError):
        return None
