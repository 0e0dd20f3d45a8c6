"""Numbers in as many bits as they need: one by one for headers, whole arrays at once for raw fields.

The first bit written is the lowest bit of the first byte. The bits that fill the last byte are zeros, and a
reader insists on it: one content has one encoding.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.errors import MalformedPayload

Integers = npt.NDArray[np.int64]

Widths = npt.NDArray[np.int64] | npt.NDArray[np.uint8]

_BLOCK: Final = 1 << 14
"""Fields that are unpacked at once: their temporary arrays stay small."""
MAX_WIDTH: Final = 32
"""Of a field, in bits."""


class BitWriter:
    """Writes whole numbers, lowest bits first."""

    def __init__(self) -> None:
        self._bits = 0
        self._length = 0

    def put(self, value: int, width: int) -> None:
        """Write ``value``, 0 to 2^width − 1, in ``width`` bits.

        Raises:
            ValueError: it does not fit.
        """
        if not 0 <= value < 1 << width:
            raise ValueError(f"{value} does not fit into {width} bits")
        self._bits |= value << self._length
        self._length += width

    def put_gamma(self, value: int) -> None:
        """Write a whole number from 0 in Elias' gamma code of value + 1: 2 floor(log2(value + 1)) + 1 bits.

        Source: Elias, Universal codeword sets, IEEE Trans. Inf. Theory 21 (1975).
        """
        below = (value + 1).bit_length() - 1  # the number of bits below the highest one
        self.put(1 << below, below + 1)  # so many zeros, then a one
        self.put(value + 1 - (1 << below), below)

    def to_bytes(self) -> bytes:
        """All that was written; the last byte is filled with zeros."""
        return self._bits.to_bytes(-(-self._length // 8), "little")


class BitReader:
    """Reads what :class:`BitWriter` wrote."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._position = 0

    def get(self, width: int) -> int:
        """The next ``width`` bits.

        Raises:
            MalformedPayload: the payload has no more.
        """
        first, last = self._position // 8, -(-(self._position + width) // 8)
        if last > self._payload.nbytes:
            raise MalformedPayload(f"the header ends after {self._payload.nbytes} bytes, amid a number")
        bits = int.from_bytes(self._payload[first:last], "little") >> self._position % 8
        self._position += width
        return bits & (1 << width) - 1

    def get_gamma(self, largest: int) -> int:
        """The next whole number in Elias' gamma code; ``largest`` is below 2^56.

        Raises:
            MalformedPayload: the payload ends, or the number is above ``largest``.
        """
        first = self._position // 8
        window = int.from_bytes(self._payload[first : first + 8], "little") >> self._position % 8
        below = (window & -window).bit_length() - 1
        if not 0 <= below < (largest + 1).bit_length():
            raise MalformedPayload(f"a number that ends early or is above {largest:,}, the largest possible")
        self.get(below + 1)
        value = (1 << below | self.get(below)) - 1
        if value > largest:
            raise MalformedPayload(f"the number {value:,}; at most {largest:,} is possible")
        return value

    def end(self) -> memoryview:
        """What follows the header's last byte.

        Raises:
            MalformedPayload: the bits that fill the header's last byte are not zeros.
        """
        if self._position % 8 and self.get(8 - self._position % 8):
            raise MalformedPayload("the bits that fill the header's last byte are not zeros")
        return self._payload[self._position // 8 :]


def pack_fields(values: Integers, widths: Integers) -> bytes:
    """Whole numbers one after the other, ``values[i]`` in ``widths[i]`` bits.

    Args:
        values: int64, 0 to 2^width − 1, shape ``(n,)``.
        widths: int64, 0 to ``MAX_WIDTH``, shape ``(n,)``.
    """
    used = widths > 0
    if not used.all():
        values, widths = values[used], widths[used]
    if not values.size:
        return b""
    ends = np.cumsum(widths)
    starts = ends - widths
    # All fields that begin in one 32-bit word end before the end of the next: their sum fits into 64 bits.
    words = starts >> 5
    shifted = values.astype(np.uint64) << (starts & 31).astype(np.uint64)
    sums = np.add.reduceat(shifted, np.flatnonzero(np.diff(words, prepend=-1)))
    packed = np.zeros(sums.size + 1, "<u4")
    packed[:-1] = sums & np.uint64(0xFFFF_FFFF)
    packed[1:] |= (sums >> np.uint64(32)).astype(np.uint32)
    return packed.tobytes()[: field_bytes(int(ends[-1]))]


def field_bytes(bits: int) -> int:
    """The bytes that so many bits take."""
    return -(-bits // 8)


def unpack_fields(payload: memoryview, widths: Widths) -> Integers:
    """The inverse of :func:`pack_fields`, from exactly the bytes it made.

    Raises:
        MalformedPayload: the payload is longer or shorter, or the bits that fill its last byte are not zeros.
    """
    total = int(widths.sum(dtype=np.int64))
    if payload.nbytes != field_bytes(total):
        raise MalformedPayload(f"{payload.nbytes:,} bytes of raw bits; {field_bytes(total):,} are due")
    if total % 8 and payload[-1] >> total % 8:
        raise MalformedPayload("the bits that fill the last byte are not zeros")
    values = np.zeros(widths.size, np.int64)
    padded = bytes(payload) + bytes(8)
    # Every eight bytes of the payload as one number, at every byte: what a field needs, whatever its place.
    windows = np.ndarray((payload.nbytes + 1,), "<u8", padded, strides=(1,))
    position = 0
    for first in range(0, widths.size, _BLOCK):
        block = widths[first : first + _BLOCK].astype(np.int64)
        ends = np.cumsum(block)
        ends += position
        position = int(ends[-1])
        ends -= block
        numbers = windows[ends >> 3] >> (ends & 7).astype(np.uint64)
        numbers &= (np.uint64(1) << block.astype(np.uint64)) - np.uint64(1)
        values[first : first + _BLOCK] = numbers
    return values
