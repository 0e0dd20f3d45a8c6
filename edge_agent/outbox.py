"""The outbox: a device's updates on disk, until their receipt. It survives power cuts.

    counter, counter.copy  the first counter that has not been reserved, in each
    {counter}.update       an update: its counter, the newest one sent before it, the envelope
    {counter}.damaged      what was an update; what became of it is not known

Each is behind a magic and a CRC-32 (:mod:`edge_agent.checked_file`). A counter is reserved in both files
before it is used, so none is ever used twice, even if one of them is damaged. If both are, the next counter
is made from the clock, as a new outbox makes its first.

An update takes the place of older ones that were never sent. It says so itself: whatever a power cut does to
their removal, what lies between the newest one sent before and this one is superseded.
"""

import logging
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.checked_file import body_of, checked
from fedtide.wire.disk import OS_DISK, Disk, write_durably
from fedtide.wire.envelope import update_digest
from fedtide.wire.errors import MalformedFrame
from fedtide.wire.ids import Counter
from fedtide.wire.steps import Step, reached

log = logging.getLogger(__name__)

_COUNTER_FILES: Final = ("counter", "counter.copy")
_COUNTER_MAGIC: Final = b"ftc1"
_COUNTER: Final = struct.Struct("<Q")
_UPDATE_MAGIC: Final = b"ftu2"
_UPDATE: Final = struct.Struct("<QQ")
_COUNTER_NAME: Final = re.compile("[0-9]{1,20}", re.ASCII)
_UPDATE_SUFFIX: Final = ".update"
_DAMAGED_SUFFIX: Final = ".damaged"
_RESERVED_AT_ONCE: Final = 64  # two files for so many updates; a restart skips at most as many
_COUNTERS_PER_SECOND: Final = 1 << 20
_MOST_DAMAGED: Final = 8  # kept for a person to look at


@dataclass(frozen=True)
class Pending:
    """An update that waits for its receipt."""

    counter: Counter
    envelope: bytes
    digest: bytes


@dataclass(frozen=True)
class _Found:
    """An update as it lies on disk: those after ``sent_before`` and below its counter are superseded."""

    pending: Pending
    sent_before: int


class Outbox:
    """Updates on disk, oldest first.

    Whatever raises ``OSError`` here was not done, and may be done again: the same update, under its counter.

    Args:
        directory: made if it is not there.
        clock: seconds since 1970; only an outbox without a readable counter asks, so that a device that was
            set up again under its old name does not begin with counters that it has used.
        disk: where the directory is.

    Attributes:
        damaged: files that were found damaged or could not be read, now, for the first time.

    Raises:
        OSError: the directory cannot be listed or written to. A file that cannot be read is a damaged one.
    """

    def __init__(self, directory: Path, clock: Callable[[], float], disk: Disk = OS_DISK) -> None:
        self._directory = directory
        self._clock = clock
        self._disk = disk
        self.damaged: tuple[Path, ...] = ()
        disk.make_directory(directory)
        disk.sync_directory(directory)  # what a killed process renamed is relied on from here
        names = disk.names(directory)
        self._set_aside = set(_counters(names, _DAMAGED_SUFFIX))
        self._pending = self._read_all(names)
        self._sent: set[Counter] = set(self._pending)  # after a restart nobody knows: treat all as sent
        self._tidy(names)
        self._next = max((self._read_counter(), *(used + 1 for used in (*self._pending, *self._set_aside))))
        self._reserved = self._next

    def reserve(self) -> Counter:
        """A counter that was never used and never will be again.

        Raises:
            OSError: the disk is full or failed; none is given out.
        """
        if self._next >= self._reserved:
            reserved = self._next + _RESERVED_AT_ONCE
            content = checked(_COUNTER_MAGIC, _COUNTER.pack(reserved))
            for name in _COUNTER_FILES:
                write_durably(self._disk, self._directory / name, content)
            self._reserved = reserved
            reached(Step.COUNTER_RESERVED)
        counter = Counter(self._next)
        self._next += 1
        return counter

    def go_above(self, used: Counter) -> None:
        """Leave out this counter and all below it: they have been used, whatever the files say."""
        self._next = max(self._next, used + 1)

    def put(self, counter: Counter, envelope: bytes) -> Pending:
        """Make an update durable. It takes the place of older ones that were never sent.

        Raises:
            OSError: the disk is full or failed; the older ones are still there.
        """
        pending = Pending(counter, envelope, update_digest(envelope))
        others = [each for each in self._pending if each != counter]
        superseded = [each for each in others if each not in self._sent]
        sent_before = max((each for each in others if each in self._sent), default=0)
        body = _UPDATE.pack(counter, sent_before) + envelope
        write_durably(self._disk, self._file(counter), checked(_UPDATE_MAGIC, body))
        reached(Step.UPDATE_KEPT)
        self._remove_durably(superseded)
        for each in superseded:
            del self._pending[each]
        self._pending[counter] = pending
        return pending

    def supersede_before(self, counter: Counter) -> None:
        """What waits and is older than this has never been sent, and must not be.

        Raises:
            OSError: the disk failed.
        """
        superseded = [each for each in self._pending if each < counter]
        self._remove_durably(superseded)
        for each in superseded:
            del self._pending[each]

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
        return counter in self._set_aside

    def remove(self, counter: Counter) -> None:
        """Forget an update: its receipt has come.

        Raises:
            OSError: the disk failed.
        """
        # Not synced: should a power cut bring it back, the coordinator knows it and answers "duplicate".
        self._disk.remove(self._file(counter))
        self._pending.pop(counter, None)
        self._sent.discard(counter)
        reached(Step.UPDATE_REMOVED)

    def __len__(self) -> int:
        return len(self._pending)

    def _file(self, counter: int, suffix: str = _UPDATE_SUFFIX) -> Path:
        return self._directory / f"{counter}{suffix}"

    def _from_clock(self) -> int:
        return max(0, int(self._clock())) * _COUNTERS_PER_SECOND

    def _read_counter(self) -> int:
        counts = [count for name in _COUNTER_FILES for count in self._count_in(self._directory / name)]
        return max(counts) if counts else self._from_clock()

    def _count_in(self, file: Path) -> Iterator[int]:
        try:
            body = body_of(_COUNTER_MAGIC, self._disk.read(file), _COUNTER.size)
        except FileNotFoundError:
            return
        except (MalformedFrame, OSError) as error:
            self._note_damage(file, f"there is another copy of it: {error}")
            return
        yield _COUNTER.unpack(body)[0]

    def _read_all(self, names: list[str]) -> dict[Counter, Pending]:
        found: dict[Counter, _Found] = {}
        for counter in _counters(names, _UPDATE_SUFFIX):
            file = self._file(counter)
            try:
                found[counter] = _found(counter, self._disk.read(file))
            except (MalformedFrame, OSError) as error:
                self._note_damage(file, f"it is set aside: {error}")
                self._disk.replace(file, self._file(counter, _DAMAGED_SUFFIX))
                self._set_aside.add(counter)
        superseded = {
            older for newer, each in found.items() for older in found if each.sent_before < older < newer
        }
        self._remove_durably(superseded)
        return {counter: each.pending for counter, each in found.items() if counter not in superseded}

    def _remove_durably(self, superseded: Collection[Counter]) -> None:
        """The update that says that they are superseded may go before them: they must not come back then."""
        for counter in superseded:
            self._disk.remove(self._file(counter))
        if superseded:
            self._disk.sync_directory(self._directory)

    def _tidy(self, names: list[str]) -> None:
        """Remove what a power cut left unfinished, and the oldest of what was set aside."""
        for name in names:
            if name.endswith(".new"):
                self._disk.remove(self._directory / name)
        for counter in sorted(self._set_aside)[:-_MOST_DAMAGED]:
            self._disk.remove(self._file(counter, _DAMAGED_SUFFIX))

    def _note_damage(self, file: Path, consequence: str) -> None:
        self.damaged += (file,)
        log.error("%s is damaged; %s", file, consequence, extra={"event": "outbox.damaged"})


def _counters(names: Iterable[str], suffix: str) -> list[Counter]:
    """The counters in the names of one kind of file, lowest first; other files are none of ours."""
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(Counter(int(stem)) for stem in stems if _COUNTER_NAME.fullmatch(stem))


def _found(counter: Counter, content: bytes) -> _Found:
    """The update in a file's content.

    Raises:
        MalformedFrame: it is not the one that was written under this counter.
    """
    body = body_of(_UPDATE_MAGIC, content)
    if len(body) < _UPDATE.size:
        raise MalformedFrame(f"it has only {len(content)} bytes")
    written_as, sent_before = _UPDATE.unpack_from(body)
    if written_as != counter:
        raise MalformedFrame(f"it holds the update with counter {written_as}")
    envelope = body[_UPDATE.size :]
    return _Found(Pending(counter, envelope, update_digest(envelope)), sent_before)
