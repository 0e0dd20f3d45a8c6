"""Every test with a ``codec`` argument runs on every entry of the table: a new codec needs no new test.

What it does need is an entry in ``ERROR_BOUNDS``, and two golden files made once by other means than the
codec itself: ``<codec>.bin``, the encoding of ``golden_delta()``, and ``<codec>.decoded.bin``, the
little-endian float32 values it decodes to. No test writes them, and they never change: devices and journals
hold such bytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtide.wire.codecs import CODECS, Codec, NotFinite, WrongLength, get
from fedtide.wire.codecs.rate import Rate, Request
from fedtide.wire.errors import MalformedPayload, UnknownCodec
from fedtide.wire.parameters import Schema, TensorSpec, Vector

GOLDEN: Final = Path(__file__).parent.parent / "golden" / "codecs"
SIZES: Final = (0, 1, 2, 255, 256, 257, 600, 512 * 256, 512 * 256 + 300)
"""None, one, around a block of q8, several blocks with a partial one, around a tile of q8."""
LARGEST: Final = float(np.finfo(np.float32).max)
SMALLEST: Final = float(np.finfo(np.float32).smallest_subnormal)

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
every_size = pytest.mark.parametrize("size", SIZES)


def schema_of(size: int) -> Schema:
    return Schema(tensors=(TensorSpec(name="p.w", dtype="float32", shape=(size,)),))


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def from_bits(*patterns: int) -> Vector:
    return np.array(patterns, np.uint32).view(np.float32)


def sample_delta(size: int, magnitude: float = 1e-3) -> Vector:
    return (np.random.default_rng(size).standard_normal(size) * magnitude).astype(np.float32)


def golden_delta() -> Vector:
    """600 exact values: 256 zeros, 256 up to 50/1024, and 88 up to twice that."""
    index = np.arange(600)
    return ((index * 37 % 101 - 50) * (index // 256) / 1024).astype(np.float32)


def float32_bound(delta: Vector, step: float) -> npt.NDArray[np.float64]:
    return np.zeros(delta.size)


def float16_bound(delta: Vector, step: float) -> npt.NDArray[np.float64]:
    """Half a unit in the last place (relative 2^-11, at least 2^-25), or the excess over 65504."""
    magnitudes = np.abs(delta.astype(np.float64))
    bounds: npt.NDArray[np.float64] = np.maximum(magnitudes * 2**-11, 2**-25)
    return np.where(magnitudes > 65504, magnitudes - 65504, bounds)


def q8_bound(delta: Vector, step: float) -> npt.NDArray[np.float64]:
    """Half a scale, plus the roundings of scale, quotient and product: together below 2^-16 of a scale."""
    bounds = np.empty(delta.size)
    for start in range(0, delta.size, 256):
        block = delta[start : start + 256].astype(np.float64)
        scale = np.abs(block).max() / 127
        bound = scale * (0.5 + 2**-16)
        if scale < 2**-126:  # no normal scale: the block becomes zeros
            bound = scale * 127
        if scale > LARGEST / 128:  # the scale stops there, and levels saturate
            bound = scale
        bounds[start : start + 256] = bound
    return bounds


def ecsq_bound(delta: Vector, step: float) -> npt.NDArray[np.float64]:
    """The widest dead zone, 0.78 of a step, and 0.3, as far as thresholds are shifted at most.

    That is more than the step that is lost where the next level is above all of float32.

    The step is at least 2^-126 and has 8 bits: relative 2^-8.
    """
    values = delta.astype(np.float64)
    absolute = step * np.sqrt(np.mean(values**2)) if delta.size else 0.0
    absolute = max(absolute, 2**-126) * (1 + 2**-8)
    return np.full(delta.size, 1.08 * absolute)


def lowrank_bound(delta: Vector, step: float) -> npt.NDArray[np.float64]:
    """Two and a half steps: of a vector, what does not pay for its bits becomes zero.

    The step is at least 2^-100 and has 8 bits: relative 2^-8.
    """
    values = delta.astype(np.float64)
    absolute = step * np.sqrt(np.mean(values**2)) if delta.size else 0.0
    return np.full(delta.size, 2.5 * max(absolute, 2**-100) * (1 + 2**-8))


ERROR_BOUNDS: Final[dict[str, Callable[[Vector, float], npt.NDArray[np.float64]]]] = {
    "float32": float32_bound,
    "float16": float16_bound,
    "q8": q8_bound,
    "ecsq": ecsq_bound,
    "lowrank": lowrank_bound,
}
"""For each codec, from the delta and the step asked for: of every parameter's error."""

FINE: Final = Request(Rate(step=0.5))
"""So that an adjustable codec's payload is more than its header."""
STEPS: Final = (2**-8, 0.5, 4.0, 64.0)
"""Of the adjustable codecs, in units of the delta's rms: fine, dense, usual, and nearly all becomes zero."""

finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
deltas = st.lists(finite_floats, max_size=300).map(lambda values: vector(*values))
small_deltas = st.lists(st.floats(-(2**-13), 2**-13, width=32), max_size=300).map(
    lambda values: vector(*values)
)


def assert_within_bound(codec: Codec, delta: Vector) -> None:
    schema = schema_of(delta.size)
    for step in STEPS if codec.adjustable else (1.0,):
        payload = codec.encode(delta, schema, Request(Rate(step=step)))
        assert len(payload) <= codec.max_bytes(schema)
        decoded = codec.decode(payload, schema)
        errors = np.abs(delta.astype(np.float64) - decoded.astype(np.float64))
        assert np.isfinite(decoded).all()
        assert (errors <= ERROR_BOUNDS[codec.codec_id](delta, step)).all()


def assert_rejected_or_finite(codec: Codec, payload: bytes, size: int) -> None:
    try:
        decoded = codec.decode(payload, schema_of(size))
    except MalformedPayload:
        return
    assert decoded.shape == (size,)
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


# The table


def test_each_codec_stands_in_the_table_under_its_own_id() -> None:
    assert [codec.codec_id for codec in CODECS.values()] == list(CODECS)
    assert {"float32", "float16", "q8"} <= set(CODECS)


@every_codec
def test_get_finds_a_codec_by_its_id(codec: Codec) -> None:
    assert get(codec.codec_id) is codec


@pytest.mark.parametrize("codec_id", ["", "zfp", "Q8", "q8 ", "q8\0", "x" * 10_000])
def test_an_unknown_codec_is_refused_with_the_list_of_known_ones(codec_id: str) -> None:
    with pytest.raises(UnknownCodec, match="float32, float16, q8") as caught:
        get(codec_id)
    assert len(str(caught.value)) < 300


def test_the_table_is_closed() -> None:
    with pytest.raises(TypeError):
        CODECS["mine"] = CODECS["q8"]  # type: ignore[index]


# Round trips


@every_codec
@every_size
def test_the_round_trip_error_is_within_the_bound(codec: Codec, size: int) -> None:
    assert_within_bound(codec, sample_delta(size))


@every_codec
@settings(deadline=None)  # a busy machine is no failure
@given(delta=deltas | small_deltas)
def test_the_round_trip_error_of_any_delta_is_within_the_bound(codec: Codec, delta: Vector) -> None:
    assert_within_bound(codec, delta)


@every_codec
@pytest.mark.parametrize("magnitude", [LARGEST, 65504.0, 65520.0, 1e-7, 2**-126, 127 * 2**-126, SMALLEST])
def test_values_at_the_ends_of_a_range_decode_within_the_bound(codec: Codec, magnitude: float) -> None:
    assert_within_bound(codec, vector(magnitude, -magnitude, magnitude / 2, 0, 1))
    assert_within_bound(codec, vector(magnitude, -magnitude, magnitude / 2, 0))


@every_codec
@every_size
def test_zeros_decode_to_zeros(codec: Codec, size: int) -> None:
    zeros, schema = np.zeros(size, np.float32), schema_of(size)
    assert np.array_equal(codec.decode(codec.encode(zeros, schema), schema), zeros)


@every_codec
def test_encoding_twice_gives_the_same_bytes_and_leaves_the_delta_as_it_was(codec: Codec) -> None:
    delta, schema = sample_delta(1000), schema_of(1000)
    before = delta.tobytes()
    delta.flags.writeable = False
    assert codec.encode(delta, schema) == codec.encode(delta.copy(), schema)
    assert delta.tobytes() == before


@every_codec
def test_a_strided_delta_encodes_like_its_contiguous_copy(codec: Codec) -> None:
    delta, schema = sample_delta(1200)[::2], schema_of(600)
    assert codec.encode(delta, schema) == codec.encode(delta.copy(), schema)


@every_codec
@every_size
def test_a_payload_is_no_longer_than_max_bytes(codec: Codec, size: int) -> None:
    schema = schema_of(size)
    assert len(codec.encode(sample_delta(size), schema)) <= codec.max_bytes(schema)


@pytest.mark.parametrize(
    ("codec_id", "size", "expected"),
    # q8: 600 levels and ceil(600 / 256) = 3 scales of 4 bytes.
    [("float32", 600, 2400), ("float16", 600, 1200), ("q8", 600, 612), ("q8", 512, 520), ("q8", 513, 525)],
)
def test_payload_sizes_are_as_computed_by_hand(codec_id: str, size: int, expected: int) -> None:
    codec, schema = get(codec_id), schema_of(size)
    assert codec.max_bytes(schema) == expected
    assert len(codec.encode(sample_delta(size), schema)) == expected


# Decoding into a vector that is there already


@every_codec
@every_size
def test_decoding_into_out_gives_the_same_bits_and_returns_out(codec: Codec, size: int) -> None:
    schema = schema_of(size)
    payload = codec.encode(sample_delta(size), schema)
    out = np.full(size, 7, np.float32)
    assert codec.decode(payload, schema, out) is out
    assert out.tobytes() == codec.decode(payload, schema).tobytes()


@every_codec
@pytest.mark.parametrize("offset", range(4))
def test_a_payload_at_any_address_decodes_to_the_same_aligned_values(codec: Codec, offset: int) -> None:
    schema = schema_of(600)
    payload = codec.encode(sample_delta(600), schema)
    shifted = memoryview(b"\xff" * offset + payload)[offset:]
    decoded = codec.decode(shifted, schema)
    assert decoded.flags.aligned
    assert decoded.tobytes() == codec.decode(payload, schema).tobytes()


@every_codec
def test_an_out_of_another_shape_dtype_or_layout_is_our_own_mistake(codec: Codec) -> None:
    schema = schema_of(600)
    payload = codec.encode(sample_delta(600), schema)
    read_only = np.zeros(600, np.float32)
    read_only.flags.writeable = False
    wrong: list[npt.NDArray[Any]] = [
        np.zeros(599, np.float32),
        np.zeros((600, 1), np.float32),
        np.zeros(600, np.float64),
        np.zeros(1200, np.float32)[::2],
        read_only,
    ]
    for out in wrong:
        with pytest.raises(ValueError, match="out "):
            codec.decode(payload, schema, out)


# What encode refuses

NOT_FINITE_BITS: Final = {
    "infinity": 0x7F800000,
    "minus infinity": 0xFF800000,
    "quiet NaN": 0x7FC00000,
    "signalling NaN": 0x7F800001,
    "NaN of all ones": 0xFFFFFFFF,
}
every_non_finite = pytest.mark.parametrize("bits", NOT_FINITE_BITS.values(), ids=NOT_FINITE_BITS.keys())


@every_codec
@every_non_finite
def test_a_delta_with_one_non_finite_value_anywhere_is_not_encoded(codec: Codec, bits: int) -> None:
    schema = schema_of(300)
    for place in range(300):
        delta = sample_delta(300)
        delta.view(np.uint32)[place] = bits
        with pytest.raises(ValueError, match="NaN or an infinity"):
            codec.encode(delta, schema)


@every_codec
@pytest.mark.parametrize(
    "delta", [np.zeros(5, np.float32), np.zeros(6, np.float64), np.zeros((2, 3), np.float32)], ids=str
)
def test_a_delta_of_another_shape_or_dtype_is_not_encoded(codec: Codec, delta: Vector) -> None:
    with pytest.raises(ValueError, match="this plan needs float32"):
        codec.encode(delta, schema_of(6))


# What decode refuses


@every_codec
def test_every_truncation_is_rejected(codec: Codec) -> None:
    schema = schema_of(300)
    payload = codec.encode(sample_delta(300), schema, FINE)
    for length in range(len(payload)):
        with pytest.raises(MalformedPayload):
            codec.decode(payload[:length], schema)


@every_codec
@every_size
def test_one_byte_too_many_is_rejected(codec: Codec, size: int) -> None:
    schema = schema_of(size)
    error = MalformedPayload if codec.adjustable else WrongLength
    with pytest.raises(error):
        codec.decode(codec.encode(sample_delta(size), schema) + b"\0", schema)


@every_codec
@every_size
def test_a_payload_longer_than_max_bytes_is_a_wrong_length(codec: Codec, size: int) -> None:
    schema = schema_of(size)
    with pytest.raises(WrongLength):
        codec.decode(bytes(codec.max_bytes(schema) + 1), schema)


@every_codec
def test_an_empty_payload_is_a_wrong_length(codec: Codec) -> None:
    with pytest.raises(WrongLength, match="payload of 0 bytes"):
        codec.decode(b"", schema_of(1))


@every_codec
def test_the_length_is_checked_before_anything_is_allocated(codec: Codec) -> None:
    error = MalformedPayload if codec.adjustable else WrongLength
    with pytest.raises(error):  # not MemoryError: the decoded vector would have 2^60 bytes
        codec.decode(bytes(1000), schema_of(2**58))


@every_codec
@settings(deadline=None)  # a busy machine is no failure
@given(payload=st.binary(max_size=2000), size=st.integers(0, 600))
def test_random_bytes_are_rejected_as_malformed_or_decode_to_finite_values(
    codec: Codec, payload: bytes, size: int
) -> None:
    assert_rejected_or_finite(codec, payload, size)


@every_codec
@settings(deadline=None)  # a busy machine is no failure
@given(content=st.data(), size=st.sampled_from([1, 5, 256, 260]))
def test_random_bytes_of_the_right_length_are_rejected_or_decode_to_finite_values(
    codec: Codec, content: st.DataObject, size: int
) -> None:
    length = codec.max_bytes(schema_of(size))
    assert_rejected_or_finite(codec, content.draw(st.binary(min_size=length, max_size=length)), size)


@every_codec
def test_a_payload_with_any_one_byte_set_to_ones_is_rejected_or_decodes_to_finite_values(
    codec: Codec,
) -> None:
    payload = codec.encode(sample_delta(300), schema_of(300), FINE)
    for place in range(len(payload)):
        assert_rejected_or_finite(codec, payload[:place] + b"\xff" + payload[place + 1 :], 300)


@every_non_finite
def test_a_float32_payload_with_one_non_finite_value_anywhere_is_rejected(bits: int) -> None:
    for place in range(300):
        values = sample_delta(300)
        values.view(np.uint32)[place] = bits
        assert_not_finite("float32", values.tobytes(), 300)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0x7E00, 0x7FFF, 0xFC01, 0xFFFF], ids=hex)
def test_a_float16_payload_with_one_non_finite_value_anywhere_is_rejected(bits: int) -> None:
    for place in range(300):
        values = sample_delta(300).astype("<f2")
        values.view("<u2")[place] = bits
        assert_not_finite("float16", values.tobytes(), 300)


@pytest.mark.parametrize(
    "bits",
    [
        *NOT_FINITE_BITS.values(),
        0x7C000000,
        0x7F7FFFFF,
        0x80000000,
        0x80000001,
        0xBF800000,
        1,
        0x007FFFFF,
    ],
    ids=hex,
)
@pytest.mark.parametrize("block", range(3))
def test_a_q8_scale_that_is_not_finite_or_out_of_range_is_rejected(bits: int, block: int) -> None:
    scales = np.ones(3, np.float32)
    scales.view(np.uint32)[block] = bits
    assert_not_finite("q8", scales.tobytes() + bytes(600), 600)


def assert_not_finite(codec_id: str, payload: bytes, size: int) -> None:
    out = np.full(size, 7, np.float32)
    with pytest.raises(NotFinite):
        get(codec_id).decode(payload, schema_of(size), out)
    assert (out == 7).all(), "a rejected payload leaves out as it was"


def test_the_largest_and_smallest_allowed_q8_scales_decode_every_level_to_finite_normal_values() -> None:
    # 0x7BFFFFFF is the largest float32 / 128, so that level -128 gives the largest; 0x00800000 is 2^-126.
    scales = from_bits(0x7BFFFFFF, 0x00800000)
    levels = np.tile(np.arange(-128, 128, dtype=np.int8), 2)
    decoded = get("q8").decode(scales.tobytes() + levels.tobytes(), schema_of(512))
    assert decoded[0] == -LARGEST
    assert np.isfinite(decoded).all()
    assert np.array_equal(decoded[256:], np.arange(-128, 128) * np.float32(2**-126))


def test_every_finite_float16_pattern_decodes_to_its_value() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    finite = patterns[(patterns & 0x7C00) != 0x7C00]
    decoded = get("float16").decode(finite.astype("<u2").tobytes(), schema_of(finite.size))
    # IEEE 754: (-1)^sign * 2^(exponent - 15) * (1 + fraction / 1024), subnormal: * 2^-14 * fraction / 1024.
    exponent, fraction = (finite >> 10 & 31).astype(float), (finite & 1023) / 1024
    magnitude = np.where(exponent == 0, 2.0**-14 * fraction, 2.0 ** (exponent - 15) * (1 + fraction))
    assert np.array_equal(decoded, np.where(finite >> 15, -magnitude, magnitude))
    assert np.array_equal(np.signbit(decoded), finite >> 15 == 1)


# Numbers computed by hand


def test_float32_without_out_is_a_view_on_the_payload() -> None:
    payload = np.ones(8, "<f4").tobytes()
    decoded = get("float32").decode(payload, schema_of(8))
    assert np.shares_memory(decoded, np.frombuffer(payload, np.uint8))
    assert not decoded.flags.writeable


def test_float32_keeps_every_bit() -> None:
    delta = from_bits(0x80000000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0x3F800001)
    schema = schema_of(5)
    payload = get("float32").encode(delta, schema)
    assert payload[:8] == bytes.fromhex("00000080 01000000")  # -0.0 and the smallest subnormal, little-endian
    assert get("float32").decode(payload, schema).tobytes() == delta.tobytes()


def test_float16_rounds_to_even_and_saturates() -> None:
    # 1 + 2^-11 lies between 1 and 1 + 2^-10: the tie goes to the even fraction, 1; 1 + 3 * 2^-11 to 1 + 2^-9.
    delta = vector(1, 1 + 2**-11, 1 + 3 * 2**-11, -2, 65504, 65520, 1e30, -LARGEST, 2**-24, 2**-25)
    schema = schema_of(10)
    payload = get("float16").encode(delta, schema)
    assert payload == bytes.fromhex("003c 003c 023c 00c0 ff7b ff7b ff7b fffb 0100 0000")
    expected = vector(1, 1, 1 + 2**-9, -2, 65504, 65504, 65504, -65504, 2**-24, 0)
    assert np.array_equal(get("float16").decode(payload, schema), expected)


def test_a_q8_payload_is_as_computed_by_hand() -> None:
    # Peak 254, so the scale is 254 / 127 = 2 (bits 0x40000000). Levels: 254/2 = 127, -254/2 = -127,
    # 3/2 = 1.5 -> 2, 1/2 -> 0 and 5/2 = 2.5 -> 2 (ties to even), -7/2 = -3.5 -> -4, 0.9/2 -> 0.
    delta, schema = vector(254, -254, 3, 1, 5, -7, 0.9), schema_of(7)
    payload = get("q8").encode(delta, schema)
    assert payload == bytes.fromhex("00000040 7f 81 02 00 02 fc 00")
    assert np.array_equal(get("q8").decode(payload, schema), vector(254, -254, 4, 0, 4, -8, 0))


def test_each_q8_block_has_its_own_scale() -> None:
    # Scales 1, 0 (all zero) and 0.5; all scales stand before all levels.
    delta = np.concatenate([np.full(256, 127), np.zeros(256), vector(63.5, -0.5)]).astype(np.float32)
    schema = schema_of(514)
    payload = get("q8").encode(delta, schema)
    assert payload == bytes.fromhex("0000803f 00000000 0000003f") + b"\x7f" * 256 + bytes(256) + b"\x7f\xff"
    assert np.array_equal(get("q8").decode(payload, schema), delta)


def test_a_q8_block_too_small_for_a_normal_scale_becomes_zeros() -> None:
    # 127 * 2^-126 has the smallest normal scale, 2^-126 (bits 0x00800000); 126 * 2^-126 has none.
    schema = schema_of(1)
    assert get("q8").encode(vector(127 * 2**-126), schema) == bytes.fromhex("00008000 7f")
    assert get("q8").encode(vector(126 * 2**-126), schema) == bytes(5)


def test_q8_saturates_at_the_largest_scale() -> None:
    # LARGEST / (LARGEST / 128) = 128, one above the top level 127.
    schema = schema_of(2)
    payload = get("q8").encode(vector(LARGEST, -LARGEST), schema)
    assert payload == bytes.fromhex("ffffff7b 7f 81")
    assert np.array_equal(
        get("q8").decode(payload, schema), vector(LARGEST / 128 * 127, -LARGEST / 128 * 127)
    )


# Bytes that are out there


@every_codec
def test_the_golden_delta_encodes_to_the_golden_bytes(codec: Codec) -> None:
    payload = codec.encode(golden_delta(), schema_of(600))
    assert payload == (GOLDEN / f"{codec.codec_id}.bin").read_bytes()


@every_codec
def test_the_golden_bytes_decode_to_the_golden_values_to_the_bit(codec: Codec) -> None:
    decoded = codec.decode((GOLDEN / f"{codec.codec_id}.bin").read_bytes(), schema_of(600))
    assert decoded.astype("<f4").tobytes() == (GOLDEN / f"{codec.codec_id}.decoded.bin").read_bytes()
