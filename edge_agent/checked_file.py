"""A file's content behind its magic and a CRC-32 of all the rest, so that damage is noticed.

    magic (4 bytes), CRC-32 (u32, little-endian), body

A CRC-32 finds every single flipped bit and every burst of up to 32 (Peterson and Brown, "Cyclic Codes for
Error Detection", Proceedings of the IRE, 1961). It does not find an old file in a new one's place: whoever
could be misled by that writes into the body what the file is about.
"""

import struct
import zlib
from typing import Final

from fedtide.wire.errors import MalformedFrame

_START: Final = struct.Struct("<4sI")
START_BYTES: Final = _START.size


def checked(magic: bytes, body: bytes) -> bytes:
    """The content of a file with this body."""
    return _START.pack(magic, zlib.crc32(body)) + body


def body_of(magic: bytes, content: bytes, size_bytes: int | None = None) -> bytes:
    """The body in a file's content.

    Args:
        magic: of this kind of file.
        content: all of it.
        size_bytes: the body's size, where there is only one.

    Raises:
        MalformedFrame: it is not what was written.
    """
    if len(content) < START_BYTES or content[:4] != magic:
        raise MalformedFrame(f"it does not begin as such a file does, with {magic!r}")
    body = content[START_BYTES:]
    if size_bytes is not None and len(body) != size_bytes:
        raise MalformedFrame(f"it has {len(content)} bytes, not {START_BYTES + size_bytes}")
    if _START.unpack_from(content)[1] != zlib.crc32(body):
        raise MalformedFrame("it does not have its CRC-32")
    return body
