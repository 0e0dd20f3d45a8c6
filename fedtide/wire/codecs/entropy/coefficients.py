"""Classes of coefficients to bytes and back, without loss: the one entropy coder of all codecs.

A class holds coefficients (whole numbers, mostly zeros) that are alike, so that one table of :mod:`tokens`
suits them. Both sides know the number of classes and a default table for each.

    payload  = header | symbols of all classes (rANS) | signs | raw bits
    header   = for each class: number of nonzeros (gamma) [ 0 | 1 dense (1) gaps' and excesses' marginal ]
    marginal = 0 (the default's) | 1 index (5) spread (2) | 2 shift (5) length (6) of each bucket

The numbers 0, 1 and 2 take two bits, those in parentheses so many. Brackets hold what a class of less than
eight nonzeros does not have: it is coded with the default table. A class ends with its last nonzero: the
zeros after it are not written, the reader asks for as many as it needs. The first signs (a one for a negative
coefficient) are the rANS lanes' seeds, the others follow the symbols. Raw bits come token by token,
the gap's before the excess's.

Tokens are worked on in blocks, and what is kept of them is small, so that neither side needs much more memory
than the coefficients have as float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy import rans
from fedtide.wire.codecs.entropy.bits import BitReader, BitWriter, FieldReader, FieldWriter, field_bytes
from fedtide.wire.codecs.entropy.nonzeros import Nonzeros
from fedtide.wire.codecs.entropy.table_choice import chosen_table, read_choice, write_choice
from fedtide.wire.codecs.entropy.tokens import NUMBER_BITS, TableChoice, TokenTable, token_table
from fedtide.wire.errors import MalformedPayload

LARGEST: Final = 1 << NUMBER_BITS
"""Magnitude of a coefficient, at most; classes are shorter."""
FEWEST_FOR_A_TABLE: Final = 8
"""Nonzeros of a class from which on it can have a table of its own."""

_PARTS: Final = 64
"""Blocks that many tokens are worked on in, so that what a block takes hardly counts."""
_SMALLEST_BLOCK: Final = 1 << 12
_LARGEST_BLOCK: Final = 1 << 15
_SMALLEST_BLOCK_OF_COEFFICIENTS: Final = 1 << 13

Integers = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.integer]
Coefficients = npt.NDArray[np.signedinteger]
"""int32, or less where all magnitudes fit: that takes less memory."""
Fields = npt.NDArray[np.int64]


def encode_classes(
    classes: Iterable[Coefficients], defaults: Sequence[TableChoice], header: BitWriter | None = None
) -> bytes:
    """Encode the coefficients of all classes.

    Args:
        classes: integers of shape ``(n,)`` each, zeros included, in the order in which they are read.
        defaults: a table for each; another one is written down where that takes fewer bytes.
        header: what comes before, bit for bit; it is added to.

    Raises:
        ValueError: a magnitude above ``LARGEST``, or a class that is not shorter.
    """
    header, raw = BitWriter() if header is None else header, FieldWriter()
    runs, symbols, negative = [], [_NO_SYMBOLS], [_NO_SYMBOLS.view(np.bool_)]
    for coefficients, default in zip(classes, defaults, strict=True):
        blocks = list(_token_blocks(coefficients))
        count = sum(block.gaps.size for block in blocks)
        header.put_gamma(count)
        if not count:
            continue
        choice = default
        if count >= FEWEST_FOR_A_TABLE:
            choice = chosen_table(
                [block.gaps for block in blocks], [block.excesses for block in blocks], default
            )
            write_choice(header, choice, default)
        table = token_table(choice)
        runs.append(rans.Run(table.frequencies, count))
        for block in blocks:
            symbols.append(_put_raw_bits(raw, block, table))
            negative.append(block.negative)
    return header.to_bytes() + _coded(runs, np.concatenate(symbols), np.concatenate(negative), raw)


@dataclass(frozen=True)
class _Tokens:
    """Nonzero coefficients, shape ``(nonzeros,)`` each, in the smallest types that hold them."""

    gaps: Numbers
    excesses: Numbers
    negative: rans.Bits


def _token_blocks(coefficients: Coefficients) -> Iterator[_Tokens]:
    if coefficients.size >= LARGEST:
        raise ValueError(
            f"a class of {coefficients.size:,} coefficients; it must have fewer than {LARGEST:,}"
        )
    tokens_at_once = max(coefficients.size // _PARTS, _SMALLEST_BLOCK_OF_COEFFICIENTS)
    parts = 1 + int(np.count_nonzero(coefficients)) // tokens_at_once
    size = max(1, -(-coefficients.size // parts))
    before = -1
    for start in range(0, coefficients.size, size):
        block = coefficients[start : start + size]
        (positions,) = (block != 0).nonzero()  # twice as fast as of the coefficients themselves
        if not positions.size:
            continue
        values = block[positions].astype(np.int32)
        excesses = np.abs(values)  # of -2^31, it is negative
        if int(excesses.max()) > LARGEST or int(excesses.min()) < 0:
            raise ValueError(f"a coefficient of magnitude above {LARGEST:,}")
        excesses -= 1
        gaps = positions - 1
        gaps[1:] -= positions[:-1]
        gaps[0] -= before - start
        before = start + int(positions[-1])
        yield _Tokens(_compact(gaps), _compact(excesses), values < 0)


def _compact(numbers: Numbers) -> Numbers:
    """The same numbers in the smallest type."""
    largest = int(numbers.max())
    for kind in (np.uint8, np.uint16):
        if largest <= np.iinfo(kind).max:
            return numbers.astype(kind)
    return numbers.astype(np.int32)


def _put_raw_bits(raw: FieldWriter, tokens: _Tokens, table: TokenTable) -> rans.Symbols:
    """Write what tells the numbers of each bucket apart, and return the symbols."""
    symbols = table.gaps.of(tokens.gaps)
    symbols *= np.uint8(table.excesses.widths.size)
    symbols += table.excesses.of(tokens.excesses)
    widths = table.widths.take(symbols, axis=0).reshape(-1)
    (places,) = (widths != 0).nonzero()  # five times as fast as of the bytes themselves
    if places.size:
        numbers = np.empty((symbols.size, 2), np.int32)
        numbers[:, 0] = tokens.gaps
        numbers[:, 1] = tokens.excesses
        numbers -= table.first_numbers.take(symbols, axis=0)
        raw.put(numbers.reshape(-1)[places].astype(np.int64), widths[places])
    return symbols


def _coded(runs: Sequence[rans.Run], symbols: rans.Symbols, negative: rans.Bits, raw: FieldWriter) -> bytes:
    if not runs:
        return b""
    seeds = rans.SEED_BITS * rans.lanes_for(symbols.size)
    return b"".join((
        rans.encode(symbols, runs, negative[:seeds]),
        np.packbits(negative[seeds:], bitorder="little").tobytes(),
        raw.to_bytes(),
    ))  # fmt: skip


class CoefficientReader:
    """Reads classes from a payload. Everything is decoded and checked at once; ``take`` only places it."""

    def __init__(
        self,
        payload: memoryview | BitReader,
        defaults: Sequence[TableChoice],
        max_coefficients: int,
        max_large: int | None = None,
        max_nonzeros: int | None = None,
    ) -> None:
        """Decode all of the payload.

        Args:
            payload: contiguous bytes, all of which must be used; or where a header before is read to.
            defaults: as for encoding.
            max_coefficients: how many all classes together can have, zeros included.
            max_large: how many of them can be beyond int16; None: all.
            max_nonzeros: how many of them can be other than zero; None: all.

        Raises:
            MalformedPayload: anything is wrong with the payload.
        """
        if max_large is None:
            max_large = max_coefficients
        if max_nonzeros is None:
            max_nonzeros = max_coefficients
        limits = _Limits(max_coefficients, max_large, min(max_nonzeros, max_coefficients))
        self._nonzeros, ends = _decoded(payload, defaults, limits)
        self._ends = ends
        self._next = np.concatenate([_START, ends])[:-1]

    def take(self, class_index: int, count: int) -> Integers:
        """The next ``count`` coefficients of a class, new and writeable."""
        coefficients = np.empty(count, np.int32)
        self.read(class_index, coefficients)
        return coefficients

    def read(self, class_index: int, out: Integers | npt.NDArray[np.float32]) -> None:
        """Fill ``out``, shape ``(count,)``, with the next coefficients of a class."""
        start = int(self._next[class_index])
        end = min(start + out.size, int(self._ends[class_index]))
        self._next[class_index] = end
        self._nonzeros.place(start, end, out)

    def read_each(self, counts: Fields, out: Integers) -> None:
        """Fill ``out`` with the next ``counts[c]`` coefficients of every class c, class by class."""
        starts, self._next = self._next, np.minimum(self._next + counts, self._ends)
        self._nonzeros.place_each(starts, self._next, np.cumsum(counts) - counts, out)

    def take_nonzeros(self) -> tuple[Integers, Integers, Fields]:
        """All coefficients that are not zero, those of class 0 first, in place of taking class by class.

        Returns:
            Their places, ascending over all classes; they themselves; where each class ends among the places.
        """
        self._next = self._ends
        places, coefficients = self._nonzeros.all()
        return places, coefficients, self._ends

    @property
    def peak(self) -> int:
        """The largest magnitude of any class."""
        return self._nonzeros.peak

    def finish(self) -> None:
        """Return if all nonzero coefficients were taken.

        Raises:
            MalformedPayload: a class is longer than what was asked of it.
        """
        for number, (taken, end) in enumerate(zip(self._next.tolist(), self._ends.tolist(), strict=True)):
            if taken < end:
                first = int(self._ends[number - 1]) if number else 0
                raise MalformedPayload(
                    f"class {number} has {end - first:,} coefficients; {taken - first:,} of them have a place"
                )


def _block_size(size: int) -> int:
    """Coefficients, or tokens, of so many that are worked on at once."""
    return min(max(size // _PARTS, _SMALLEST_BLOCK), _LARGEST_BLOCK)


class _Limits(NamedTuple):
    """How many coefficients there can be, and how many of them beyond int16 and other than zero."""

    coefficients: int
    large: int
    nonzeros: int


def _decoded(
    payload: memoryview | BitReader, defaults: Sequence[TableChoice], limits: _Limits
) -> tuple[Nonzeros, Fields]:
    """All nonzeros, and where each class ends among their places."""
    max_coefficients, max_large, left = limits
    header = payload if isinstance(payload, BitReader) else BitReader(payload)
    counts, choices = [], []
    for default in defaults:
        count = header.get_gamma(left)
        left -= count
        counts.append(count)
        if count:
            choices.append(read_choice(header, default) if count >= FEWEST_FOR_A_TABLE else default)
    body = header.end()
    total = sum(counts)
    if body.nbytes < field_bytes(max(0, total - rans.SEED_BITS * rans.lanes_for(total))):
        raise MalformedPayload(f"{total:,} nonzeros in {body.nbytes:,} bytes: their signs alone take more")
    tables = [token_table(choice) for choice in choices]
    counted = [count for count in counts if count]
    runs = [rans.Run(table.frequencies, count) for table, count in zip(tables, counted, strict=True)]
    symbols, seeds, used = rans.decode(body, runs)
    negative, rest = _signs(body[used:], seeds, total)
    raw = FieldReader(rest)
    nonzeros = Nonzeros(total, max_coefficients)
    class_ends = np.zeros(len(counts), np.int64)
    lasts = np.cumsum(counts)
    finder = _TokenFinder(tables, counted)
    size, end = _block_size(max_coefficients), 0
    for first in range(0, total, size):
        last = min(first + size, total)
        numbers = finder.numbers(symbols[first:last], first, raw)
        positions = np.cumsum(numbers[:, 0], dtype=np.int64)
        positions += np.arange(end, end + last - first)
        end = int(positions[-1]) + 1
        if end > max_coefficients:
            raise MalformedPayload(f"more coefficients than the {max_coefficients:,} that there are")
        values = numbers[:, 1] + np.int32(1)
        values *= 1 - 2 * negative[first:last].view(np.int8)
        nonzeros.add(positions, values, max_large)
        inside = (lasts > first) & (lasts <= last)
        class_ends[inside] = positions[lasts[inside] - first - 1] + 1
    raw.finish()
    return nonzeros, np.maximum.accumulate(class_ends)


class _TokenFinder:
    """Gaps and excesses of symbols of all classes."""

    def __init__(self, tables: Sequence[TokenTable], counts: Sequence[int]) -> None:
        self._sizes = [0, *(table.widths.shape[0] for table in tables)]
        self._starts = np.cumsum(self._sizes[:-1])
        self._ends = np.cumsum(counts)
        self._widths = np.concatenate([_NO_WIDTHS, *(table.widths for table in tables)])
        self._first_numbers = np.concatenate([_NO_NUMBERS, *(table.first_numbers for table in tables)])

    def numbers(self, symbols: rans.Symbols, first: int, raw: FieldReader) -> Integers:
        """Gap and excess of each, shape ``(n, 2)``; ``first`` tokens come before them."""
        low, high = self._ends.searchsorted([first, first + symbols.size - 1], side="right")
        ends = np.minimum(self._ends[low : high + 1], first + symbols.size)
        entries = np.repeat(self._starts[low : high + 1], np.diff(ends, prepend=first))
        entries += symbols
        numbers: Integers = self._first_numbers.take(entries, axis=0)
        widths = self._widths.take(entries, axis=0).reshape(-1)
        (places,) = (widths != 0).nonzero()
        if places.size:
            flat = numbers.reshape(-1)
            flat[places] += raw.get(widths[places]).astype(np.int32)
        return numbers


def _signs(payload: memoryview, seeds: rans.Bits, count: int) -> tuple[rans.Bits, memoryview]:
    """Whether each coefficient is negative, and what follows the signs."""
    byte_count = field_bytes(max(0, count - seeds.size))
    if payload.nbytes < byte_count:
        raise MalformedPayload(f"{payload.nbytes:,} bytes follow the symbols; the signs take {byte_count:,}")
    signs = np.unpackbits(np.frombuffer(payload, np.uint8, byte_count), bitorder="little").view(np.bool_)
    negative = np.concatenate([seeds, signs])
    if negative[count:].any():
        raise MalformedPayload("the bits that fill the signs' last byte or seed are not zeros")
    return negative[:count], payload[byte_count:]


_START: Final = np.zeros(1, np.int64)
_NO_SYMBOLS: Final = np.empty(0, np.uint8)
_NO_WIDTHS: Final = np.empty((0, 2), np.uint8)
_NO_NUMBERS: Final = np.empty((0, 2), np.int32)
