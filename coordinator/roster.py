"""The roster: one public key file per enrolled device, ``{device}.pub``, in ``roster/``.

``fedtide enrol`` adds a file, and removing one revokes; a running coordinator notices either within a second.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedtide.wire import ids
from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import DeviceId
from fedtide.wire.signatures import PublicKey

_LOOK_AGAIN_S: Final = 1.0


class RosterFull(Exception):
    """More devices than ``max_devices``."""


class KeyConflict(Exception):
    """A device that is enrolled already, with another key."""


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

    def enrol(self, device: DeviceId, key: PublicKey) -> None:
        """Add a device.

        Raises:
            KeyConflict: it is enrolled with another key.
            RosterFull: there is no room.
        """
        self._refresh(now=True)
        known = self._keys.get(device)
        if known == key:
            return
        if known is not None:
            raise KeyConflict(
                f"device {device} is enrolled with key {known}; remove {self._file(device)} to replace it"
            )
        if len(self._keys) >= self._max_devices:
            raise RosterFull(f"{len(self._keys)} devices are enrolled; max_devices is {self._max_devices}")
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file(device).write_text(f"{key}\n")
        self._keys[device] = key

    def _file(self, device: DeviceId) -> Path:
        return self._directory / f"{device}.pub"

    def _refresh(self, *, now: bool = False) -> None:
        moment = self._clock()
        if not now and moment - self._looked_at < _LOOK_AGAIN_S:
            return
        self._looked_at = moment
        try:
            modified = self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            self._keys, self._modified = {}, None
            return
        unchanged = modified == self._modified
        if unchanged and self._settled:
            return
        # A file may have been half written when it was read, and two changes in one tick of the file system's
        # clock look like one: so everything is read once more at the next look.
        self._keys = dict(_read_keys(self._directory))
        self._modified, self._settled = modified, unchanged


def _read_keys(directory: Path) -> list[tuple[DeviceId, PublicKey]]:
    keys = []
    for file in directory.glob("*.pub"):
        try:
            keys.append((ids.device_id(file.stem), PublicKey.load(file)))
        except (ValueError, MalformedId, FileNotFoundError):
            continue  # half written or not a key: the device stays unknown, and is told so
    return keys
