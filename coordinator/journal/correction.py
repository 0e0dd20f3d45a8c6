"""Putting a single flipped bit right. Pure.

A CRC says of one wrong bit where it is: the difference between the checksum found and the one expected is
different for every place, in up to 2³² − 1 bits (Koopman and Chakravarty, "Cyclic Redundancy Code (CRC)
Polynomial Selection For Embedded Networks", DSN 2004). With more wrong bits there may be no such place, or,
one time in 2³² by the number of places, a wrong one; an update's signature would tell.
"""

from typing import Final
from zlib import crc32

from coordinator.journal.format import HEAD_BYTES, HEADER_BYTES, SegmentHeader, read_head

_POLYNOMIAL: Final = 0xEDB88320  # IEEE 802.3, bits reversed, as zlib has it
_MAX_BODY_BYTES: Final = 4 << 20  # 8 steps a byte


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        remainder = value
        for _ in range(8):
            remainder = remainder >> 1 ^ (_POLYNOMIAL if remainder & 1 else 0)
        table.append(remainder)
    return tuple(table)


_TABLE: Final = _table()


def corrected_header(content: bytes) -> bytes | None:
    """A segment's header with one bit turned so that it has its checksum; None where that does not help."""
    for changed in _single_flips(content[:HEADER_BYTES]):
        try:
            SegmentHeader.from_bytes(changed)
        except ValueError:
            continue
        return changed
    return None


def corrected_record(content: bytes, *, salt: int, sequence: int, chain: int) -> bytes | None:
    """The record at the beginning of ``content`` with one bit turned, as head and body.

    Args:
        content: from the damaged record on.
        salt: the segment's.
        sequence: the number it should have.
        chain: checksum of the record before.

    Returns:
        None where no single bit makes it whole and right for its place.
    """
    if read_head(content, 0, salt) is None:
        for changed in _single_flips(content[:HEAD_BYTES]):
            head = read_head(changed, 0, salt)
            if head is not None and (head.sequence, head.chain) == (sequence, chain):
                body = content[HEAD_BYTES : HEAD_BYTES + head.length]
                if len(body) == head.length and crc32(body, head.crc) == head.body_crc:
                    return changed + body
        return None
    return _with_body_corrected(content, salt, sequence, chain)


def _with_body_corrected(content: bytes, salt: int, sequence: int, chain: int) -> bytes | None:
    head = read_head(content, 0, salt)
    assert head is not None, "the head was whole"
    body = content[HEAD_BYTES : HEAD_BYTES + head.length]
    if (
        len(body) < head.length
        or len(body) > _MAX_BODY_BYTES
        or (head.sequence, head.chain) != (sequence, chain)
    ):
        return None
    difference = crc32(body, head.crc) ^ head.body_crc
    if difference.bit_count() == 1:  # the checksum itself
        return content[: HEAD_BYTES - 4] + crc32(body, head.crc).to_bytes(4, "big") + body
    place = _place_of(difference, len(body))
    if place is None:
        return None
    fixed = bytearray(body)
    fixed[place // 8] ^= 1 << place % 8
    return content[:HEAD_BYTES] + bytes(fixed)


def _place_of(difference: int, length: int) -> int | None:
    """Which bit of a body of so many bytes changes its checksum by ``difference``."""
    changes = [_TABLE[1 << bit] for bit in range(8)]  # of the last byte's bits
    for byte in reversed(range(length)):
        if difference in changes:
            return 8 * byte + changes.index(difference)
        changes = [change >> 8 ^ _TABLE[change & 0xFF] for change in changes]
    return None


def _single_flips(content: bytes) -> list[bytes]:
    flips = []
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(changed))
    return flips
