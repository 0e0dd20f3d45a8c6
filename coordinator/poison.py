"""Poison: bytes that break whoever reads them. What is being read is noted, so that the next run knows. Pure.

An exception is caught where it is raised. A crash in C code, or the kernel's killer of large processes,
leaves nothing but the note of what was in progress: what was so at two ends in a row is not read again. The
note is never synced; the system's memory outlives the process, and a power cut is no sign of poison.

    32 bytes       what is being read, named by 32 bytes; zeros while nothing is
    64 times       name, and one byte: at how many ends in a row it was being read
"""

import hashlib
from collections.abc import Mapping
from typing import Final, Protocol

MOST_ENDS: Final = 2
"""In progress at so many ends in a row, and it is not read again: one end may be anybody's fault."""
MOST_SUSPECTS: Final = 64
NAME_BYTES: Final = 32
NOTHING: Final = bytes(NAME_BYTES)
NOTE_BYTES: Final = NAME_BYTES + MOST_SUSPECTS * (NAME_BYTES + 1)

_NAMED_BYTES: Final = 2048


class Watch(Protocol):
    """Is told what is being read, by a name of 32 bytes: a hash."""

    def is_poison(self, name: bytes) -> bool:
        """Whether this must not be read again."""

    def begins(self, name: bytes) -> None:
        """It is about to be read. Without an :meth:`ends` after it, it may be what ended the process."""

    def ends(self) -> None:
        """It was read, whatever came of it."""

    def set_aside(self, device: str, name: bytes, content: bytes, error: Exception | None) -> None:
        """Keep bytes for a person; ``error``: what reading them raised, None where they are not read."""


class Unwatched:
    """Takes note of nothing: where what is read has been read before, and in tests."""

    def is_poison(self, name: bytes) -> bool:
        """See ``Watch.is_poison``."""
        del name
        return False

    def begins(self, name: bytes) -> None:
        """See ``Watch.begins``."""

    def ends(self) -> None:
        """See ``Watch.ends``."""

    def set_aside(self, device: str, name: bytes, content: bytes, error: Exception | None) -> None:
        """See ``Watch.set_aside``."""


UNWATCHED: Final = Unwatched()


def name_of(message: bytes) -> bytes:
    """What the note calls a message: a hash of its length and its first 2 KiB, which hold the claimed digest.

    Enough to know honest bytes again, at a tenth of the cost of hashing them all.
    """
    start = len(message).to_bytes(8, "little") + message[:_NAMED_BYTES]
    return hashlib.blake2b(start, digest_size=NAME_BYTES).digest()


def note_of(suspects: Mapping[bytes, int]) -> bytes:
    """The note of a run that begins, with how often what was in progress when earlier ones ended."""
    rows = b"".join(name + bytes((min(ends, 255),)) for name, ends in list(suspects.items())[-MOST_SUSPECTS:])
    return (NOTHING + rows).ljust(NOTE_BYTES, b"\0")


def suspects_after(note: bytes) -> dict[bytes, int]:
    """What an ended run's note says: at how many ends in a row each was in progress, the latest last.

    Anything may be there instead of a note: what is cut short, or names nothing, says nothing.
    """
    suspects = {}
    for place in range(NAME_BYTES, len(note) - NAME_BYTES, NAME_BYTES + 1):
        name, ends = note[place : place + NAME_BYTES], note[place + NAME_BYTES]
        if name != NOTHING and ends:
            suspects[name] = ends
    current = note[:NAME_BYTES]
    if len(current) == NAME_BYTES and current != NOTHING:
        suspects[current] = suspects.pop(current, 0) + 1
    return dict(list(suspects.items())[-MOST_SUSPECTS:])
