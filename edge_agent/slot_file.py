"""A model slot's file: a sealed head, its parameters, and the head once more. Pure.

    length of the sealed head (u32, little-endian), sealed head, parameters, the head again, its length

Where one end is damaged, the other still says which model this was, so that a device goes back to no older.
"""

import struct
from typing import Final

from fedtide.wire.errors import MalformedFrame
from fedtide.wire.frame import MAX_MESSAGE_BYTES

_LENGTH: Final = struct.Struct("<I")
MOST_END_BYTES: Final = _LENGTH.size + MAX_MESSAGE_BYTES
"""At either end of a file, to find the head in."""


def packed(sealed_head: bytes, content: bytes) -> bytes:
    """The file of this head and these parameters."""
    length = _LENGTH.pack(len(sealed_head))
    return b"".join((length, sealed_head, content, sealed_head, length))


def unpacked(file: bytes) -> tuple[bytes, bytes]:
    """The sealed head and the parameters in a file.

    Raises:
        MalformedFrame: its two ends do not agree.
    """
    head = first_head(file)
    end_bytes = _LENGTH.size + len(head)
    if len(file) < 2 * end_bytes or file[-end_bytes:] != head + file[: _LENGTH.size]:
        raise MalformedFrame(f"a slot of {len(file)} bytes whose ends do not agree")
    return head, file[end_bytes:-end_bytes]


def first_head(start: bytes) -> bytes:
    """The sealed head at the start of a file, if that is not damaged."""
    length = int.from_bytes(start[: _LENGTH.size], "little")
    return start[_LENGTH.size : _LENGTH.size + length]


def last_head(end: bytes) -> bytes:
    """The sealed head at the end of a file, if that is not damaged."""
    length = int.from_bytes(end[-_LENGTH.size :], "little")
    return end[: -_LENGTH.size][-length:]
