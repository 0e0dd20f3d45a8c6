"""The outbox: a device's updates on disk, until their receipt. It survives power cuts.

    counter           the first counter that has not been reserved
    {counter}.update  an update: magic, CRC-32, envelope

A counter is reserved on disk before it is used, so none is ever used twice.
"""

import logging
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedtide.wire.durable import write_durably
from fedtide.wire.envelope import update_digest
from fedtide.wire.ids import Counter

log = logging.getLogger(__name__)

_MAGIC: Final = b"ftu1"
_HEADER: Final = struct.Struct("<4sI")
_RESERVED_AT_ONCE: Final = 64  # one fsync for so many updates; a restart skips at most as many
_COUNTERS_PER_SECOND: Final = 1 << 20


@dataclass(frozen=True)
class Pending:
    """An update that waits for its receipt."""

    counter: Counter
    envelope: bytes
    digest: bytes


class Outbox:
    """Updates on disk, oldest first.

    Args:
        directory: made if it is not there.
        clock: seconds since 1970; only a new outbox asks, so that a device that was set up again under its
            old name does not begin with counters that it has used.
        sync: False for simulated devices.
    """

    def __init__(self, directory: Path, clock: Callable[[], float], *, sync: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._sync = sync
        self._pending = dict(sorted(self._read_all()))
        self._sent: set[Counter] = set(self._pending)  # after a restart nobody knows: treat all as sent
        self._next = max([self._read_counter(clock), *(counter + 1 for counter in self._pending)])
        self._reserved = self._next

    def reserve(self) -> Counter:
        """A counter that was never used and never will be again."""
        if self._next >= self._reserved:
            self._reserved = self._next + _RESERVED_AT_ONCE
            write_durably(self._directory / "counter", b"%d\n" % self._reserved, sync=self._sync)
        counter = Counter(self._next)
        self._next += 1
        return counter

    def put(self, counter: Counter, envelope: bytes) -> Pending:
        """Make an update durable. It takes the place of older ones that were never sent."""
        pending = Pending(counter, envelope, update_digest(envelope))
        content = _HEADER.pack(_MAGIC, zlib.crc32(envelope)) + envelope
        write_durably(self._file(counter), content, sync=self._sync)
        for unsent in set(self._pending) - self._sent:
            self.remove(unsent)
        self._pending[counter] = pending
        return pending

    def oldest(self) -> Pending | None:
        """The update that is in flight, or next."""
        return next(iter(self._pending.values()), None)

    def note_sent(self, counter: Counter) -> None:
        """From here on this update may have been applied: only a receipt removes it."""
        self._sent.add(counter)

    def was_sent(self, counter: Counter) -> bool:
        """Whether any of it has left this device, as far as is known."""
        return counter in self._sent

    def was_damaged(self, counter: Counter) -> bool:
        """Whether this update was found damaged and set aside: what became of it is not known."""
        return self._set_aside(self._file(counter)).exists()

    def remove(self, counter: Counter) -> None:
        """Forget an update: its receipt has come."""
        # Not synced: should a power cut bring it back, the coordinator knows it and answers "duplicate".
        self._file(counter).unlink(missing_ok=True)
        self._pending.pop(counter, None)
        self._sent.discard(counter)

    def __len__(self) -> int:
        return len(self._pending)

    def _file(self, counter: Counter) -> Path:
        return self._directory / f"{counter}.update"

    @staticmethod
    def _set_aside(file: Path) -> Path:
        return file.with_suffix(".damaged")

    def _read_counter(self, clock: Callable[[], float]) -> int:
        try:
            return int((self._directory / "counter").read_text())
        except (FileNotFoundError, ValueError):
            return int(clock()) * _COUNTERS_PER_SECOND

    def _read_all(self) -> list[tuple[Counter, Pending]]:
        found = []
        for file in self._directory.glob("*.update"):
            envelope = _read(file)
            if envelope is None:
                file.replace(self._set_aside(file))
                log.error("%s is damaged and was set aside", file, extra={"event": "outbox.damaged"})
                continue
            counter = Counter(int(file.stem))
            found.append((counter, Pending(counter, envelope, update_digest(envelope))))
        return found


def _read(file: Path) -> bytes | None:
    content = file.read_bytes()
    if len(content) < _HEADER.size or not file.stem.isdigit():
        return None
    magic, crc = _HEADER.unpack_from(content)
    envelope = content[_HEADER.size :]
    return envelope if magic == _MAGIC and crc == zlib.crc32(envelope) else None
