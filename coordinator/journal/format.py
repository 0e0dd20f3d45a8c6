"""The bytes of a segment. Pure.

    header   magic 8, format u32, first record's number u64, chain u32, the snapshot's SHA-256 32, CRC u32
    record   head 30, CRC of the body u32, body
    head     mark 4, kind u8, last of its batch u8, place in its batch u32, body's length u32, number u64,
             chain u32, CRC u32

All numbers are big endian. Checksums are CRC-32 (IEEE 802.3), which finds every error of up to 32 bits in a
row. They are chained: a head names the checksum of the record before it, which for a segment's first record
is in the header; the head's own checksum begins with the header's, and the body's with the head's. So a
record stands in its place and in no other, and a head says on its own where the next one is: damage inside a
body hides nothing else. A body of a device's making cannot pass for records: nobody outside knows the header.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

FORMAT: Final = 1
MAGIC: Final = b"\x89ftj\r\n\x1a\n"  # as PNG's: what changes line ends or clears bit 7 breaks it
MARK: Final = b"\xf5rec"
_HEADER: Final = struct.Struct(">8sIQI32s")
_HEAD: Final = struct.Struct(">4sBBIIQI")
_CRC: Final = struct.Struct(">I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
HEAD_BYTES: Final = _HEAD.size + 2 * _CRC.size
MAX_BODY_BYTES: Final = 2**32 - 1
_NO_SNAPSHOT: Final = bytes(32)


@dataclass(frozen=True)
class SegmentHeader:
    """What a segment begins with.

    Attributes:
        first: number of its first record.
        chain: checksum of the record before.
        snapshot: SHA-256 of the snapshot file with the state after that record; None: there is none.
    """

    first: int
    chain: int
    snapshot: bytes | None

    def to_bytes(self) -> bytes:
        """As it stands in the file."""
        content = _HEADER.pack(MAGIC, FORMAT, self.first, self.chain, self.snapshot or _NO_SNAPSHOT)
        return content + _CRC.pack(crc32(content))

    @property
    def salt(self) -> int:
        """What checksums of heads begin with."""
        return crc32(self.to_bytes())

    @classmethod
    def from_bytes(cls, content: bytes) -> "SegmentHeader":
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: not a header, or not as it was written.
        """
        if len(content) < HEADER_BYTES:
            raise ValueError(f"the header has {len(content)} bytes, {HEADER_BYTES} are needed")
        fields = content[: _HEADER.size]
        magic, number, first, chain, snapshot = _HEADER.unpack(fields)
        if crc32(fields) != _CRC.unpack_from(content, _HEADER.size)[0]:
            raise ValueError("the header does not have its checksum")
        if magic != MAGIC:
            raise ValueError("this is not a segment of a journal")
        if number != FORMAT:
            raise ValueError(f"the segment has format {number}; this build reads format {FORMAT}")
        return cls(first, chain, None if snapshot == _NO_SNAPSHOT else snapshot)


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before a record's body.

    Attributes:
        kind: of the record.
        last: whether it is the last of its batch.
        place: how many records of its batch are before it.
        length: bytes of the body.
        sequence: its number.
        chain: checksum of the record before.
        crc: its own checksum, with which the body's begins.
        body_crc: what the body's shall be.
    """

    kind: int
    last: bool
    place: int
    length: int
    sequence: int
    chain: int
    crc: int
    body_crc: int

    @property
    def batch(self) -> int:
        """Number of the first record of its batch."""
        return self.sequence - self.place


@dataclass(frozen=True)
class Encoded:
    """Records as they stand in a segment: one contiguous piece, and the last one's checksum."""

    content: bytes
    chain: int


def encode(bodies: Sequence[tuple[int, bytes]], *, sequence: int, chain: int, salt: int) -> Encoded:
    """A batch.

    Args:
        bodies: kind and body of each record; at least one.
        sequence: number of the first.
        chain: checksum of the record before.
        salt: the segment's.

    Raises:
        ValueError: a body is too long.
    """
    pieces: list[bytes] = []
    for place, (kind, body) in enumerate(bodies):
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"a record of {len(body)} bytes; at most {MAX_BODY_BYTES} fit")
        last = place == len(bodies) - 1
        head = _HEAD.pack(MARK, kind, last, place, len(body), sequence + place, chain)
        crc = crc32(head, salt)
        chain = crc32(body, crc)
        pieces += (head, _CRC.pack(crc), _CRC.pack(chain), body)
    return Encoded(b"".join(pieces), chain)


def read_head(content: bytes, offset: int, salt: int) -> Head | None:
    """The head at ``offset``; None where there is no whole and undamaged one."""
    end = offset + _HEAD.size
    if offset < 0 or end + 2 * _CRC.size > len(content):
        return None
    mark, kind, last, place, length, sequence, chain = _HEAD.unpack_from(content, offset)
    crc = _CRC.unpack_from(content, end)[0]
    if mark != MARK or crc32(memoryview(content)[offset:end], salt) != crc:
        return None
    body_crc = _CRC.unpack_from(content, end + _CRC.size)[0]
    return Head(kind, last == 1, place, length, sequence, chain, crc, body_crc)


_END: Final = struct.Struct(">QQI")
END_BYTES: Final = _END.size + _CRC.size


@dataclass(frozen=True)
class End:
    """How much of a segment was synced.

    Attributes:
        first: the segment's.
        length: bytes that are durable.
        chain: checksum of the last record in them.
    """

    first: int
    length: int
    chain: int

    def to_bytes(self) -> bytes:
        """As it is appended to the file ``end``."""
        content = _END.pack(self.first, self.length, self.chain)
        return content + _CRC.pack(crc32(content, 1))  # from 1, or zeros would be whole

    @classmethod
    def last_in(cls, content: bytes) -> "End | None":
        """The last that is whole; whatever else is there was torn."""
        newest = None
        for offset in range(0, len(content) - END_BYTES + 1, END_BYTES):
            fields = content[offset : offset + _END.size]
            if crc32(fields, 1) == _CRC.unpack_from(content, offset + _END.size)[0]:
                newest = cls(*_END.unpack(fields))
        return newest


def damaged_ends(content: bytes) -> list[int]:
    """Offsets in the file ``end`` of what is not whole."""
    places = range(0, len(content), END_BYTES)
    return [place for place in places if End.last_in(content[place : place + END_BYTES]) is None]
