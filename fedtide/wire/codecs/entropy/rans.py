"""Interleaved rANS over fixed tables, one numpy operation for all lanes at a time.

Every lane is a coder of its own with a 32-bit state; symbol i belongs to lane i mod lanes. All lanes share
one sequence of 16-bit words, taken in the order of symbols. Source: Duda, Asymmetric numeral systems,
arXiv 1311.2540; interleaving: Giesen, Interleaved entropy coders, arXiv 1402.3392.

A state is below 2^32 and, between symbols, at least 2^16. With a symbol's frequency f and the sum c of those
before it, both out of 2^PRECISION, encoding x makes (x div f) · 2^PRECISION + c + (x mod f); before, the
lower 16 bits go to the words where the result would not fit.

The encoder starts each lane at 2^16 + 16 payload bits ("seeds", such as signs), and the decoder ends there:
they are no overhead, and states that end elsewhere betray damaged bytes.

    coded = lengths (4 bits per lane) | states (16 to 31 bits per lane) | words (uint16)

A state travels without its highest bit, and its length less 17 before it: about 4 bits of overhead per lane.

All operands of a step have the shape ``(lanes,)``, constants too: on few lanes, numpy's cost is that of the
call, and a scalar operand doubles it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtide.wire.codecs.entropy.bits import field_bytes, pack_fields, unpack_fields
from fedtide.wire.errors import MalformedPayload

PRECISION: Final = 13
"""Frequencies are out of 2^13."""
SEED_BITS: Final = 16
"""Payload bits in each lane's first state."""

Symbols = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint16]

_TOTAL: Final = 1 << PRECISION
_LOWEST: Final = 1 << 16
"""Of a state between symbols."""
_SHORT_LANE: Final = 64
"""Symbols per lane: its 4 bits of overhead are 1 % of what 64 symbols of 6 bits take."""
_LONGEST_SHORT: Final = 6400
"""Symbols up to which lanes are so short. Beyond, their number and their lengths both grow with the root."""
_MOST_LANES: Final = 640
"""More make a step longer, but hardly faster for each symbol."""
_SMALLEST_BLOCK: Final = 1 << 12
_LARGEST_BLOCK: Final = 1 << 15
_PARTS: Final = 16
"""Blocks of symbols whose table entries are looked up at once: so many that their memory hardly counts."""
_NONE: Final = np.empty(0, np.int64)


@dataclass(frozen=True)
class Table:
    """Frequencies of the symbols 0, 1, ...: whole numbers that add up to 2^PRECISION.

    Attributes:
        frequencies: int64, shape ``(symbols,)``; a symbol of frequency 0 cannot be coded.
        before: for each symbol, the sum of the frequencies before it.
    """

    frequencies: Integers
    before: Integers


def table_of(frequencies: Integers) -> Table:
    """The table of these frequencies.

    Raises:
        ValueError: there are more than 256, one is below 0, or they do not add up to 2^PRECISION.
    """
    if frequencies.size > 256 or frequencies.min(initial=0) < 0 or int(frequencies.sum()) != _TOTAL:
        raise ValueError(f"frequencies must be up to 256 numbers from 0 that add up to {_TOTAL}")
    return Table(frequencies, np.cumsum(frequencies) - frequencies)


@dataclass(frozen=True)
class Run:
    """So many consecutive symbols that share a table."""

    table: Table
    count: int


def lanes_for(symbols: int) -> int:
    """How many lanes so many symbols are coded in."""
    if symbols <= _LONGEST_SHORT:
        return -(-symbols // _SHORT_LANE)
    return min(isqrt(symbols * _LONGEST_SHORT) // _SHORT_LANE, _MOST_LANES)


def encode(symbols: Symbols, runs: Sequence[Run], seeds: Bits) -> bytes:
    """Encode uint8 symbols of shape ``(n,)``, which the runs cover in order.

    Args:
        symbols: each one within its table.
        runs: their counts add up to n.
        seeds: at most ``SEED_BITS`` per lane; zeros follow them.
    """
    states = _first_states(seeds, lanes_for(symbols.size))
    words: list[bytes] = []
    tables = _Tables(runs)
    for first, last in reversed(list(_blocks(symbols.size, states.size))):
        words.append(_encode_block(states, *tables.intervals(symbols[first:last], first)))
    return b"".join((_pack_states(states.astype(np.int64)), *reversed(words)))


def decode(payload: memoryview, runs: Sequence[Run]) -> tuple[Symbols, Bits, int]:
    """The symbols that the runs announce, all seeds (``SEED_BITS`` per lane), and the bytes that they took.

    Raises:
        MalformedPayload: the payload is too short, or the states do not end where an encoder begins.
    """
    size = sum(run.count for run in runs)
    lanes = lanes_for(size)
    if not lanes:
        return np.empty(0, np.uint8), np.empty(0, np.bool_), 0
    states, taken = _unpack_states(payload, lanes)
    words = np.frombuffer(payload, "<u2", (payload.nbytes - taken) // 2, taken)
    decoder = _Decoder(states, words, runs)
    symbols = np.empty(size, np.uint8)
    for first, last in _blocks(size, lanes):
        decoder.decode_block(first, symbols[first:last])
    if ((states >> SEED_BITS) != 1).any():
        raise MalformedPayload("the coder's states do not end where an encoder begins: damaged bytes")
    return symbols, _seeds(states), taken + 2 * decoder.words_used


def _blocks(size: int, lanes: int) -> Iterator[tuple[int, int]]:
    """First and last of consecutive symbols that are worked on at once: whole rows of lanes, but the last."""
    block = min(max(size // _PARTS, _SMALLEST_BLOCK), _LARGEST_BLOCK)
    step = max(1, block // max(1, lanes)) * lanes
    for first in range(0, size, max(1, step)):
        yield first, min(first + step, size)


def _first_states(seeds: Bits, lanes: int) -> Floats:
    filled = np.zeros(SEED_BITS * lanes, np.bool_)
    filled[: seeds.size] = seeds
    return np.packbits(filled, bitorder="little").view("<u2") + float(_LOWEST)


def _pack_states(states: Integers) -> bytes:
    # Whole numbers below 2^53 are exact in float64, so that frexp gives their lengths in bits.
    widths = np.frexp(states)[1].astype(np.int64) - 1
    return b"".join((
        pack_fields(widths - SEED_BITS, np.full_like(widths, 4)),
        pack_fields(states - (1 << widths), widths),
    ))  # fmt: skip


def _unpack_states(payload: memoryview, lanes: int) -> tuple[Integers, int]:
    """The states and the bytes that they took.

    Raises:
        MalformedPayload: the payload is too short, or the bits that fill a last byte are not zeros.
    """
    first = field_bytes(4 * lanes)
    widths = unpack_fields(payload[:first], np.full(lanes, 4)) + SEED_BITS
    last = first + field_bytes(int(widths.sum()))
    return unpack_fields(payload[first:last], widths) + (1 << widths), last


def _seeds(states: Integers) -> Bits:
    low = (states & (_LOWEST - 1)).astype("<u2").view(np.uint8)
    return np.unpackbits(low, bitorder="little").view(np.bool_)


class _Tables:
    """The distinct tables of all runs behind one another, and which of them each symbol has."""

    def __init__(self, runs: Sequence[Run]) -> None:
        runs = [run for run in runs if run.count]
        tables = {id(run.table): run.table for run in runs}
        numbers = {key: number for number, key in enumerate(tables)}
        self._numbers = np.array([numbers[id(run.table)] for run in runs], np.int64)
        self._ends = np.cumsum([run.count for run in runs])
        self._frequencies = np.concatenate([_NONE, *(table.frequencies for table in tables.values())])
        self._before = np.concatenate([_NONE, *(table.before for table in tables.values())])
        self._sizes = np.array([table.frequencies.size for table in tables.values()], np.int64)
        self._first_symbols = np.cumsum(self._sizes) - self._sizes

    def slots(self) -> Integers:
        """For each table and number below 2^PRECISION, which symbol it stands for, and what decoding needs.

        That is the symbol's frequency and the number's distance from ``before``, packed as
        ``frequency << 32 | symbol << 16 | distance``. 64 KiB a table: made anew for each payload, so that
        they are there once, and only while it is decoded.
        """
        entries = np.arange(self._frequencies.size) - self._first_symbols.repeat(self._sizes)
        entries <<= 16
        entries |= self._frequencies << 32
        entries -= self._before
        slots = entries.repeat(self._frequencies)
        by_table = slots.reshape(-1, _TOTAL)
        by_table += np.arange(_TOTAL)
        return slots

    def of_each(self, first: int, last: int) -> Integers:
        """Each symbol's table by number, shape ``(last - first,)``, or ``(1,)`` where it is one for all."""
        low, high = np.searchsorted(self._ends, [first, last - 1], side="right")
        if low == high:
            return self._numbers[low : low + 1]
        ends = np.minimum(self._ends[low : high + 1], last)
        return np.repeat(self._numbers[low : high + 1], np.diff(ends, prepend=first))

    def intervals(self, symbols: Symbols, first: int) -> tuple[Floats, Floats]:
        """Frequency and ``before`` of each symbol, the first of which is number ``first``."""
        places = self._first_symbols[self.of_each(first, first + symbols.size)] + symbols
        return self._frequencies.astype(np.float64)[places], self._before.astype(np.float64)[places]


def _encode_block(states: Floats, frequencies: Floats, before: Floats) -> bytes:
    """Encode the block's symbols, the last row first; their words, in the order in which they are decoded.

    In float64: whole numbers below 2^53 are exact in it, and so is the floor of a quotient of states below
    2^32 by frequencies below 2^13. It divides several times faster than integers.
    """
    lanes = states.size
    limits = frequencies * 2.0 ** (32 - PRECISION)
    complements = _TOTAL - frequencies
    words = []
    for start in range((frequencies.size - 1) // lanes * lanes, -1, -lanes):
        row = slice(start, start + lanes)
        frequency = frequencies[row]
        active = states[: frequency.size]
        (full,) = (active >= limits[row]).nonzero()
        if full.size:
            moved = active[full]
            words.append(moved)
            active[full] = np.floor(moved * 2.0**-16)
        quotient = active / frequency
        np.floor(quotient, quotient)
        quotient *= complements[row]
        active += quotient
        active += before[row]
    if not words:
        return b""
    return (np.concatenate(words[::-1]).astype(np.int64) & 0xFFFF).astype("<u2").tobytes()


class _Decoder:
    """The lanes' states, and how many words they have used."""

    def __init__(self, states: Integers, words: Words, runs: Sequence[Run]) -> None:
        self._states = states
        self._words = words
        self._tables = _Tables(runs)
        self._slots = self._tables.slots()
        self._arrays = [
            states,
            np.empty_like(states),
            np.empty_like(states),
            *(np.full_like(states, value) for value in (_TOTAL - 1, PRECISION, 32, 0xFFFF, _LOWEST, 16)),
        ]
        self.words_used = 0

    def decode_block(self, first: int, symbols: Symbols) -> None:
        """Decode the next symbols, the first of which is number ``first``.

        Raises:
            MalformedPayload: there are no words left.
        """
        slots, arrays, lanes = self._slots, self._arrays, self._states.size
        offsets = self._tables.of_each(first, first + symbols.size) << PRECISION
        one_table = offsets.size == 1
        if one_table:
            slots = slots[offsets[0] : offsets[0] + _TOTAL]
        entries = np.empty(symbols.size, np.int64)
        words = self._words[self.words_used : self.words_used + symbols.size].astype(np.int64)
        used = 0
        for start in range(0, symbols.size, lanes):
            entry = entries[start : start + lanes]
            if entry.size < lanes:  # the very last symbols
                arrays = [array[: entry.size] for array in arrays]
            states, place, work, slot_mask, precision, frequency_shift, distance_mask, lowest, word_bits = (
                arrays
            )
            np.bitwise_and(states, slot_mask, place)
            if not one_table:
                place += offsets[start : start + lanes]
            slots.take(place, out=entry, mode="clip")  # never out of range; the other modes are slower
            np.right_shift(states, precision, states)
            np.right_shift(entry, frequency_shift, work)
            np.multiply(states, work, states)
            np.bitwise_and(entry, distance_mask, work)
            np.add(states, work, states)
            (low,) = (states < lowest).nonzero()
            if low.size:
                refilled = states[low]
                incoming = words[used : used + refilled.size]
                if incoming.size < refilled.size:
                    raise MalformedPayload(f"the coded symbols need more than {self._words.size:,} words")
                refilled <<= word_bits[: refilled.size]
                refilled |= incoming
                states[low] = refilled
                used += refilled.size
        self.words_used += used
        entries >>= 16
        np.bitwise_and(entries, 0xFF, out=symbols, casting="unsafe")
