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

_WINDOW_BYTES: Final = 64
"""Of a header that are made a number at once."""
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
        self._window = 0
        self._window_start = 0
        self._window_end = 0

    def get(self, width: int) -> int:
        """The next ``width`` bits.

        Raises:
            MalformedPayload: the payload has no more.
        """
        bits = self._ahead(width) & (1 << width) - 1
        if self._position + width > 8 * self._payload.nbytes:
            raise MalformedPayload(f"the header ends after {self._payload.nbytes} bytes, amid a number")
        self._position += width
        return bits

    def _ahead(self, width: int) -> int:
        """At least ``width`` bits, zeros behind the payload; they stay unread."""
        if self._position + width > self._window_end:
            first = self._position // 8
            last = first + max(_WINDOW_BYTES, width // 8 + 2)
            self._window = int.from_bytes(self._payload[first:last], "little")
            self._window_start, self._window_end = 8 * first, 8 * last
        return self._window >> self._position - self._window_start

    def get_gamma(self, largest: int) -> int:
        """The next whole number in Elias' gamma code; ``largest`` is below 2^56.

        Raises:
            MalformedPayload: the payload ends, or the number is above ``largest``.
        """
        window = self._ahead(56)
        below = (window & -window).bit_length() - 1
        if not 0 <= below < (largest + 1).bit_length():
            raise MalformedPayload(f"a number that ends early or is above {largest:,}, the largest possible")
        value = (1 << below | self.get(2 * below + 1) >> below + 1) - 1
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


def field_bytes(bits: int) -> int:
    """The bytes that so many bits take."""
    return -(-bits // 8)


class FieldWriter:
    """Writes arrays of whole numbers, one number after the other."""

    def __init__(self) -> None:
        self._words: list[bytes] = []
        self._last = 0
        self._last_bits = 0

    def put(self, values: Integers, widths: Widths) -> None:
        """Write ``values[i]``, 0 to 2^width − 1, in ``widths[i]`` bits, 1 to ``MAX_WIDTH``."""
        if not values.size:
            return
        ends = np.cumsum(widths, dtype=np.int64)
        ends += self._last_bits
        starts = ends - widths
        # All fields that begin in one 32-bit word end before the end of the next: 64 bits hold their sum.
        words = starts >> 5
        starts &= 31
        shifted = values.astype(np.uint64) << starts.view(np.uint64)
        is_first = np.ones(words.size, np.bool_)
        np.not_equal(words[1:], words[:-1], out=is_first[1:])
        sums = np.add.reduceat(shifted, is_first.nonzero()[0])
        packed = np.zeros(sums.size + 1, "<u4")
        packed[:-1] = sums & np.uint64(0xFFFF_FFFF)
        packed[1:] |= (sums >> np.uint64(32)).astype(np.uint32)
        packed[0] |= np.uint32(self._last)
        full, self._last_bits = divmod(int(ends[-1]), 32)
        self._words.append(packed[:full].tobytes())
        self._last = int(packed[full])

    def to_bytes(self) -> bytes:
        """All that was written; the last byte is filled with zeros."""
        return b"".join((*self._words, self._last.to_bytes(4, "little")[: field_bytes(self._last_bits)]))


class FieldReader:
    """Reads what :class:`FieldWriter` wrote, from exactly the bytes it made."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._position = 0

    def get(self, widths: Widths) -> npt.NDArray[np.uint64]:
        """The next fields of these widths, 0 to ``MAX_WIDTH``, shape ``(n,)``: uint64, n small.

        Raises:
            MalformedPayload: the payload has no more.
        """
        ends = np.cumsum(widths, dtype=np.int64)
        first, offset = divmod(self._position, 8)
        bits = offset + (int(ends[-1]) if ends.size else 0)
        last = first + field_bytes(bits)
        if last > self._payload.nbytes:
            raise MalformedPayload(f"{self._payload.nbytes:,} bytes of raw bits; at least {last:,} are due")
        self._position = 8 * first + bits
        padded = bytes(self._payload[first:last]) + bytes(8)
        # Every eight bytes as one number, at every byte: what a field needs, whatever its place.
        windows = np.ndarray((last - first + 1,), "<u8", padded, strides=(1,))
        ends -= widths
        ends += offset
        numbers: npt.NDArray[np.uint64] = windows[ends >> 3]
        ends &= 7
        numbers >>= ends.view(np.uint64)
        numbers &= _MASKS[widths]
        return numbers

    def finish(self) -> None:
        """Return if everything was read.

        Raises:
            MalformedPayload: bytes are left, or the bits that fill the last byte are not zeros.
        """
        due = field_bytes(self._position)
        if self._payload.nbytes != due:
            raise MalformedPayload(f"{self._payload.nbytes:,} bytes of raw bits; {due:,} are due")
        if self._position % 8 and self._payload[-1] >> self._position % 8:
            raise MalformedPayload("the bits that fill the last byte are not zeros")


_MASKS: Final = (np.uint64(1) << np.arange(MAX_WIDTH + 1, dtype=np.uint64)) - np.uint64(1)


def pack_fields(values: Integers, widths: Integers) -> bytes:
    """What :class:`FieldWriter` makes of these fields alone; widths may be 0."""
    used = widths > 0
    if not used.all():
        values, widths = values[used], widths[used]
    writer = FieldWriter()
    writer.put(values, widths)
    return writer.to_bytes()


def unpack_fields(payload: memoryview, widths: Widths) -> Integers:
    """The inverse of :func:`pack_fields`, from exactly the bytes it made.

    Raises:
        MalformedPayload: the payload is longer or shorter, or the bits that fill its last byte are not zeros.
    """
    reader = FieldReader(payload)
    values = reader.get(widths)
    reader.finish()
    return values.view(np.int64)
