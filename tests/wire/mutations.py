"""What a stranger can do to valid bytes. Everything drawn comes from the generator that is passed in."""

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack

HEADER_BYTES: Final = 24
"""Counts, ranks, lengths and steps stand at the beginning: half of all places are drawn from there."""
LONGEST_INSERTION: Final = 64
MOST_MUTATIONS: Final = 4
"""Applied one after the other; most bytes get one."""

NOT_FINITE_OR_EXTREME_FLOATS: Final = (
    0x7F800000,  # infinity
    0xFF800000,  # minus infinity
    0x7FC00000,  # quiet NaN
    0x7F800001,  # signalling NaN
    0xFFFFFFFF,
    0x7F7FFFFF,  # the largest
    0xFF7FFFFF,
    0x00000001,  # the smallest subnormal
    0x007FFFFF,
    0x00800000,  # the smallest normal
    0x80000000,  # minus zero
    0x00000000,
    0xBF800000,  # -1
)
EXTREME_NUMBERS: Final = (
    0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x3FFF, 0x4000, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000,
    0xFFFFFFFF, 0x100000000, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF,
)  # fmt: skip
EXTREME_BYTES: Final = (0x00, 0x01, 0x3F, 0x40, 0x7E, 0x7F, 0x80, 0x81, 0xFE, 0xFF)

Mutation = Callable[[bytes, random.Random], bytes]


def _place(length: int, draw: random.Random) -> int:
    """A place in so many bytes, its end included; half of the time near the beginning."""
    return draw.randint(0, min(length, HEADER_BYTES) if draw.random() < 0.5 else length)


def _overwritten(content: bytes, place: int, piece: bytes) -> bytes:
    return content[:place] + piece + content[place + len(piece) :]


def flip_bit(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    changed[_place(len(changed) - 1, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def set_byte(content: bytes, draw: random.Random) -> bytes:
    value = draw.choice(EXTREME_BYTES) if draw.random() < 0.5 else draw.randrange(256)
    return _overwritten(content, _place(max(len(content) - 1, 0), draw), bytes((value,)))


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: _place(len(content), draw)]


def cut_out(content: bytes, draw: random.Random) -> bytes:
    place = _place(len(content), draw)
    return content[:place] + content[place + draw.randint(1, LONGEST_INSERTION) :]


def insert(content: bytes, draw: random.Random) -> bytes:
    place = _place(len(content), draw)
    piece = draw.randbytes(draw.randint(1, LONGEST_INSERTION))
    return content[:place] + piece + content[place:]


def append(content: bytes, draw: random.Random) -> bytes:
    """Trailing bytes."""
    length = draw.randint(1, LONGEST_INSERTION)
    return content + (bytes(length) if draw.random() < 0.5 else draw.randbytes(length))


def repeat(content: bytes, draw: random.Random) -> bytes:
    """A piece of it once more, right behind itself."""
    first, last = sorted((_place(len(content), draw), _place(len(content), draw)))
    return content[:last] + content[first:last] + content[last:]


def set_number(content: bytes, draw: random.Random) -> bytes:
    """A field of 1, 2, 4 or 8 bytes, in either order, set to an extreme number or to one near its own."""
    width = draw.choice((1, 2, 4, 8))
    place = _place(max(len(content) - width, 0), draw)
    order: Any = draw.choice(("little", "big"))
    value = draw.choice(EXTREME_NUMBERS)
    if draw.random() < 0.3:
        value = int.from_bytes(content[place : place + width], order) + draw.choice((-2, -1, 1, 2))
    return _overwritten(content, place, (value % (1 << 8 * width)).to_bytes(width, order))


def set_varint(content: bytes, draw: random.Random) -> bytes:
    """A number in groups of seven bits, the lowest first, extreme or without an end."""
    value, groups = draw.choice(EXTREME_NUMBERS), bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    endless = b"\xff" * draw.randint(1, 12)
    piece = endless if draw.random() < 0.2 else bytes(groups)
    place = _place(len(content), draw)
    return content[:place] + piece + content[place + draw.randint(0, 2) :]


def shift_bits(content: bytes, draw: random.Random) -> bytes:
    """Some bits put in somewhere, all later ones moved up: fields of a few bits change their meaning.

    Many zeros are a huge number in Elias' gamma code, whose length is in zeros.
    """
    bits, place = int.from_bytes(content, "little"), _place(len(content), draw) * 8 + draw.randrange(8)
    width = draw.choice((1, 2, 3, 8, 31, 64))
    inserted = draw.choice((0, (1 << width) - 1, draw.getrandbits(width)))
    below = bits & (1 << place) - 1
    changed = below | inserted << place | (bits >> place) << place + width
    return changed.to_bytes(len(content) + 1 + -(-(width + 8) // 8), "little")[
        : len(content) + draw.randrange(2)
    ]


def set_float(content: bytes, draw: random.Random) -> bytes:
    """Four bytes set to a float32 that is not finite, or extreme."""
    bits = draw.choice(NOT_FINITE_OR_EXTREME_FLOATS)
    return _overwritten(content, _place(max(len(content) - 4, 0), draw), struct.pack("<I", bits))


def fill(content: bytes, draw: random.Random) -> bytes:
    """A stretch of one value: long runs of what means "nothing" or "most" to a coder."""
    first, last = sorted((_place(len(content), draw), _place(len(content), draw)))
    return _overwritten(content, first, bytes((draw.choice(EXTREME_BYTES),)) * (last - first))


def randomise_end(content: bytes, draw: random.Random) -> bytes:
    """A valid beginning, then noise of the same length."""
    place = _place(len(content), draw)
    return content[:place] + draw.randbytes(len(content) - place)


def replace_all(content: bytes, draw: random.Random) -> bytes:
    """Random bytes, none of the old."""
    return draw.randbytes(draw.randint(0, 2 * len(content) + 8))


BYTE_MUTATIONS: Final[tuple[Mutation, ...]] = (
    flip_bit, flip_bit, set_byte, set_byte, truncate, cut_out, insert, append, repeat, set_number, set_number,
    set_varint, shift_bits, set_float, fill, randomise_end, replace_all,
)  # fmt: skip


def splice(one: bytes, other: bytes, draw: random.Random) -> bytes:
    """The beginning of one and the end of another, cut at the same place or not."""
    place = _place(len(one), draw)
    again = place if draw.random() < 0.5 else draw.randint(0, len(other))
    return one[:place] + other[again:]


def mutated(seeds: Sequence[bytes], draw: random.Random) -> bytes:
    """One of the seeds after one to four mutations, a splice with another seed among them."""
    content = draw.choice(seeds)
    for _ in range(min(draw.choice((1, 1, 1, 2, 3)), MOST_MUTATIONS)):
        if draw.random() < 0.1:
            content = splice(content, draw.choice(seeds), draw)
        else:
            content = draw.choice(BYTE_MUTATIONS)(content, draw)
    return content


EXTREME_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -1.5, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "\0", "x" * 300, "../..", "+/#", b"", b"\0", bytes(31),
    bytes(33), bytes(5000), [], [[]], [0] * 500, [[[[[[]]]]]], {}, {"": 0}, {"a": {"b": {}}},
)  # fmt: skip
"""Values of every kind that msgpack has, none of which most fields take."""


def mutated_record(record: Any, draw: random.Random) -> bytes:
    """A msgpack message of which one field, however deep, has been replaced, removed, renamed or added to."""
    return bytes(msgpack.packb(_changed(record, draw), use_bin_type=True))


def _changed(value: Any, draw: random.Random) -> Any:
    deeper = isinstance(value, dict | list | tuple) and value and draw.random() < 0.85
    if not deeper:
        return _other(value, draw)
    if isinstance(value, dict):
        return _changed_map(value, draw)
    index, items = draw.randrange(len(value)), list(value)
    match draw.randrange(8):
        case 0:
            del items[index]
        case 1:
            items.insert(index, draw.choice(EXTREME_VALUES))
        case _:
            items[index] = _changed(items[index], draw)
    return items


def _changed_map(value: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    name, fields = draw.choice(sorted(value)), dict(value)
    match draw.randrange(8):
        case 0:
            del fields[name]
        case 1:
            fields[draw.choice(sorted(value))] = fields[name]
        case 2:
            fields["unknown"] = draw.choice(EXTREME_VALUES)
        case _:
            fields[name] = _changed(fields[name], draw)
    return fields


def _other(value: Any, draw: random.Random) -> Any:
    """An extreme value, or one of the same kind that is nearly the old one."""
    changed = draw.choice(EXTREME_VALUES)
    if draw.random() < 0.5:
        match value:
            case bool():
                changed = not value
            case int():
                changed = max(-(2**63), min(value + draw.choice((-1, 1, 2**31, -(2**40))), 2**64 - 1))
            case float():
                changed = -value
            case bytes():
                changed = draw.choice(BYTE_MUTATIONS)(value, draw)
            case str():
                changed = value + draw.choice(("x", "\0", "/", "é"))
    return changed
