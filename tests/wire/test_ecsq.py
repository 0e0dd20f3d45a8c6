"""The scalar quantiser, the sizes it is asked for, and the limits of its kind."""

import tracemalloc
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from fedtide.wire.codecs import NotFinite, get
from fedtide.wire.codecs.budget import finest_within
from fedtide.wire.codecs.entropy.bits import BitWriter
from fedtide.wire.codecs.matrix_contexts import encode_tensors
from fedtide.wire.codecs.rate import COARSEST_STEP, FINEST_STEP, Rate, Request
from fedtide.wire.errors import MalformedPayload
from fedtide.wire.parameters import Schema, TensorSpec, Vector

ECSQ: Final = get("ecsq")
GOLDEN: Final = Path(__file__).parent.parent / "golden" / "codecs"


def schema_of(*shapes: tuple[int, ...]) -> Schema:
    return Schema(
        tensors=tuple(
            TensorSpec(name=f"t{number}", dtype="float32", shape=shape) for number, shape in enumerate(shapes)
        )
    )


NETWORK: Final = schema_of((160, 96), (160,), (10, 160), (10,))


def network_delta(schema: Schema = NETWORK, seed: int = 0) -> Vector:
    """Heavy-tailed, with rows and columns of different scales, as gradients of dense layers are."""
    rng = np.random.default_rng(seed)
    parts = []
    for spec in schema.tensors:
        rows, *rest = (axis or 0 for axis in spec.shape)
        scales = np.exp(rng.standard_normal(rows))[:, np.newaxis] * np.exp(
            rng.standard_normal(sum(rest) or 1)
        )
        parts.append((rng.laplace(0, 1e-3, scales.shape) * scales).reshape(-1))
    return np.concatenate(parts).astype(np.float32)


def step_of(payload: bytes) -> float:
    """The first two bytes are a float32 without its sign and its last 15 bits."""
    return float(np.uint32(int.from_bytes(payload[:2], "little") << 15).view(np.float32))


def levels_of(payload: bytes, schema: Schema) -> npt.NDArray[np.int64]:
    levels = ECSQ.decode(payload, schema) / np.float64(step_of(payload))
    return np.rint(levels).astype(np.int64)


# The quantiser


def test_levels_are_as_computed_by_hand() -> None:
    # rms = root((36 + 4 + 4 + 4 + 0 + 0) / 6) = root(8) = 2.828, given as 2 here: a step of 1 is 2.0, the
    # float32 0x40000000 and the pattern 0x8000. 4 of 6 are above 0.7 steps = 1.4: the rounding is
    # 0.22 + 0.4 * 2/3 - 0.12 * 4/9 = 0.433. 6 / 2 = 3, 2 / 2 = 1, 0.9 / 2 + 0.433 = 0.88 -> 0.
    delta = np.array([6, -2, 2, -2, 0.9, 0], np.float32)
    payload = ECSQ.encode(delta, schema_of((6,)), Request(Rate(step=1), rms=2.0))
    assert payload[:2] == bytes.fromhex("0080")
    assert ECSQ.decode(payload, schema_of((6,))).tolist() == [6, -2, 2, -2, 0, 0]


def test_the_step_follows_the_rms_of_the_request_or_else_of_the_delta() -> None:
    delta = network_delta()
    rms = float(np.sqrt(np.mean(delta.astype(np.float64) ** 2)))
    for step in (0.5, 4.0, 8.0):
        own = ECSQ.encode(delta, NETWORK, Request(Rate(step=step)))
        assert step_of(own) == pytest.approx(step * rms, rel=2**-9)
        other = ECSQ.encode(delta, NETWORK, Request(Rate(step=step), rms=3 * rms))
        assert step_of(other) == pytest.approx(3 * step * rms, rel=2**-9)


def test_without_a_rate_the_step_is_four_times_the_rms() -> None:
    delta = network_delta()
    assert ECSQ.encode(delta, NETWORK) == ECSQ.encode(delta, NETWORK, Request(Rate(step=4.0)))


@pytest.mark.parametrize("rms", [0.0, 1e-45, 1e-30])
def test_a_far_too_small_rms_does_not_make_the_payload_longer_than_allowed(rms: float) -> None:
    delta = network_delta()
    payload = ECSQ.encode(delta, NETWORK, Request(Rate(step=FINEST_STEP), rms=rms))
    assert len(payload) <= ECSQ.max_bytes(NETWORK)
    assert np.allclose(ECSQ.decode(payload, NETWORK), delta, atol=1e-5)


def test_errors_are_smaller_at_finer_steps_and_so_are_the_zeros() -> None:
    delta = network_delta()
    errors, sizes = [], []
    for step in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        payload = ECSQ.encode(delta, NETWORK, Request(Rate(step=step)))
        errors.append(float(np.square(ECSQ.decode(payload, NETWORK) - delta).sum()))
        sizes.append(len(payload))
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


# Budgets


@pytest.mark.parametrize("budget_bytes", [60, 100, 300, 1000, 3000])
def test_a_budget_is_met_closely_and_never_exceeded(budget_bytes: int) -> None:
    payload = ECSQ.encode(network_delta(), NETWORK, Request(Rate(bytes_per_update=budget_bytes)))
    assert 0.94 * budget_bytes - 4 <= len(payload) <= budget_bytes


def test_bits_per_parameter_are_bytes_over_the_number_of_parameters() -> None:
    # 160 * 96 + 160 + 10 * 160 + 10 = 17,130 parameters; 0.5 bit each make 1070.6 bytes.
    delta = network_delta()
    payload = ECSQ.encode(delta, NETWORK, Request(Rate(bits_per_parameter=0.5)))
    assert len(payload) <= 1070
    assert payload == ECSQ.encode(delta, NETWORK, Request(Rate(bytes_per_update=1070)))


def test_a_budget_that_no_step_meets_gets_the_coarsest_step() -> None:
    delta = network_delta()
    coarsest = ECSQ.encode(delta, NETWORK, Request(Rate(step=COARSEST_STEP)))
    assert ECSQ.encode(delta, NETWORK, Request(Rate(bytes_per_update=1))) == coarsest


def test_a_budget_that_all_steps_meet_gets_the_finest_step() -> None:
    delta = network_delta()
    finest = ECSQ.encode(delta, NETWORK, Request(Rate(step=FINEST_STEP)))
    assert ECSQ.encode(delta, NETWORK, Request(Rate(bytes_per_update=10**6))) == finest


@pytest.mark.parametrize("guess", [FINEST_STEP, 0.1, 4.0, COARSEST_STEP])
@pytest.mark.parametrize("budget_bytes", [1, 16, 17, 100, 1023, 5000, 16_383, 16_384, 20_000])
def test_the_finest_step_within_a_budget_is_found_from_any_guess(budget_bytes: int, guess: float) -> None:
    # Payloads of 1024 / step bytes: 16 to 2^20.
    tried: list[float] = []

    def encoded(step: float) -> bytes:
        tried.append(step)
        return bytes(int(1024 / step))

    found = len(finest_within(encoded, budget_bytes, guess))
    assert found <= max(budget_bytes, 16)
    assert found >= min(0.99 * budget_bytes, 2**20) - 1
    assert len(tried) <= 22


@pytest.mark.parametrize("codec_id", ["ecsq", "lowrank"])
@pytest.mark.parametrize(
    "rate", [Rate(bits_per_parameter=0.001), Rate(bits_per_parameter=0.1), Rate(bytes_per_update=0.5)]
)
def test_a_budget_of_next_to_nothing_gives_a_payload_that_decodes(codec_id: str, rate: Rate) -> None:
    # 601 values, one of which is a spike: 0.001 bit each, or half a byte, are budgets of 0 bytes.
    delta = np.append(np.random.default_rng(8).standard_normal(600), 1e3).astype(np.float32)
    for schema in (schema_of((601,)), schema_of((600,), (1,))):
        for rms in (None, 1.0):
            payload = get(codec_id).encode(delta, schema, Request(rate, rms))
            assert np.isfinite(get(codec_id).decode(payload, schema)).all()


@pytest.mark.parametrize("shortest", [1, 5])
@pytest.mark.parametrize("budget_bytes", [0, 1, 4, 5, 1000])
def test_a_budget_below_all_payloads_gets_the_coarsest_steps(budget_bytes: int, shortest: int) -> None:
    # 100 / 64 = 1 byte, or a few more, is what the coarsest step takes.
    tried: list[float] = []

    def encoded(step: float) -> bytes:
        tried.append(step)
        return bytes(max(shortest, int(100 / step)))

    found = finest_within(encoded, budget_bytes, 4.0)
    assert len(tried) <= 22
    assert len(found) <= budget_bytes or len(found) == shortest


# Limits of its kind


@pytest.mark.parametrize(("bits", "limit"), [(1, 4.58), (2, 10.51), (4, 22.55)])
def test_gaussian_values_come_close_to_the_limit_of_scalar_quantisation(bits: int, limit: float) -> None:
    # Limits: the optimum entropy-coded scalar quantisers of N(0, 1).
    values = np.random.default_rng(5).standard_normal(300_000).astype(np.float32)
    schema = schema_of((300_000,))
    payload = ECSQ.encode(values, schema, Request(Rate(bits_per_parameter=bits)))
    spent = 8 * len(payload) / values.size
    assert spent <= bits
    noise = np.square(ECSQ.decode(payload, schema).astype(np.float64) - values).sum()
    decibels = 10 * np.log10(np.square(values.astype(np.float64)).sum() / noise)
    assert decibels >= limit - 0.15


def test_thresholds_between_large_levels_of_gaussian_values_are_above_their_middle() -> None:
    # At a step of sigma, 48 % of N(0, 1) are above 0.7 and 8.9 % above 1.7: ln 0.089 / ln 0.484 - 17/7 = 0.9.
    # So s = 0.081 and theta is 0.22 + 0.4 * 0.484 - 0.12 * 0.484^2 + 0.12 * 0.9 = 0.493. 1 begins at
    # (1 - 0.493) / 0.919 = 0.552, 2 at 1.640, 3 at 2.728; for Laplace values, at 1, 2 and 3 - theta.
    def first_of(values: Vector, level: int) -> float:
        schema = schema_of(values.shape)
        payload = ECSQ.encode(values, schema, Request(Rate(step=1), rms=1.0))
        return float(values[levels_of(payload, schema) == level].min())

    rng = np.random.default_rng(10)
    gaussian = rng.standard_normal(200_000).astype(np.float32)
    firsts = [first_of(gaussian, level) for level in (1, 2, 3)]
    assert firsts == pytest.approx([0.552, 1.640, 2.728], abs=0.02)
    laplace = rng.laplace(0, 0.5**0.5, 200_000).astype(np.float32)
    first = first_of(laplace, 1)
    assert first_of(laplace, 2) == pytest.approx(first + 1, abs=0.01)
    assert first_of(laplace, 3) == pytest.approx(first + 2, abs=0.01)


def test_outliers_among_gaussian_values_lose_no_more_than_eight_tenths_of_a_step() -> None:
    # Half a step of rounding and 0.3 of a shifted threshold, not 8 % of 1000.
    values = np.random.default_rng(11).standard_normal(100_000).astype(np.float32)
    values[::10_000] = np.linspace(5, 1000, 10, dtype=np.float32)
    schema = schema_of((100_000,))
    decoded = ECSQ.decode(ECSQ.encode(values, schema, Request(Rate(step=1), rms=1.0)), schema)
    assert np.abs(decoded - values).max() <= 0.82


def rice_bits(numbers: npt.NDArray[np.int64]) -> int:
    """Of Rice codes with the best parameter for all numbers."""
    return min(int((numbers >> shift).sum()) + numbers.size * (1 + shift) for shift in range(24))


def rice_bytes(levels: npt.NDArray[np.int64]) -> float:
    """Gaps and magnitudes of nonzeros in Rice codes, a bit per sign; two parameters and a count."""
    (places,) = levels.nonzero()
    gaps = np.diff(places, prepend=-1) - 1
    return (rice_bits(gaps) + rice_bits(np.abs(levels[places]) - 1) + places.size) / 8 + 4


def zlib_bytes(levels: npt.NDArray[np.int64]) -> int:
    """Levels as bytes, deflated with run lengths; larger levels take two bytes more."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    content = np.clip(levels, -128, 127).astype(np.int8).tobytes()
    return len(deflate.compress(content) + deflate.flush()) + 2 * int((np.abs(levels) > 127).sum())


@pytest.mark.parametrize("bits", [0.05, 0.1, 0.25, 0.5, 1, 2, 4])
@pytest.mark.parametrize("source", ["gaussian", "laplace", "heavy", "network"])
def test_at_every_rate_neither_rice_codes_nor_zlib_take_fewer_bytes(source: str, bits: float) -> None:
    rng = np.random.default_rng(6)
    size = NETWORK.size if source == "network" else 60_000
    schema = NETWORK if source == "network" else schema_of((size,))
    drawn: dict[str, npt.NDArray[np.floating]] = {
        "gaussian": rng.standard_normal(size),
        "laplace": rng.laplace(size=size),
        "heavy": rng.laplace(size=size) * np.exp(rng.standard_normal(size)),
        "network": network_delta(),
    }
    values = drawn[source].astype(np.float32)
    payload = ECSQ.encode(values, schema, Request(Rate(bits_per_parameter=bits)))
    levels = levels_of(payload, schema)
    assert len(payload) - 2 <= rice_bytes(levels)
    assert len(payload) - 2 <= 1.001 * zlib_bytes(levels)


# Hostile bytes


@pytest.mark.parametrize("pattern", [0, 1, 0x00FF, 0xFF00, 0xFF01, 0xFFFF], ids=hex)
def test_a_step_that_is_not_a_normal_number_is_rejected(pattern: int) -> None:
    payload = ECSQ.encode(network_delta(), NETWORK)
    out = np.full(NETWORK.size, 7, np.float32)
    with pytest.raises(NotFinite, match="step"):
        ECSQ.decode(pattern.to_bytes(2, "little") + payload[2:], NETWORK, out)
    assert (out == 7).all(), "a rejected payload leaves out as it was"


def test_a_level_that_is_not_finite_at_its_step_is_rejected() -> None:
    payload = ECSQ.encode(network_delta(), NETWORK, Request(Rate(step=0.1)))
    largest = 0xFEFF.to_bytes(2, "little")
    with pytest.raises(NotFinite, match="level"):
        ECSQ.decode(largest + payload[2:], NETWORK)


def test_a_payload_for_a_larger_schema_is_rejected_and_leaves_out_as_it_was() -> None:
    payload = ECSQ.encode(network_delta(), NETWORK, Request(Rate(step=0.1)))
    out = np.full(17_129, 7, np.float32)
    with pytest.raises(MalformedPayload):
        ECSQ.decode(payload, schema_of((160, 96), (160,), (10, 160), (9,)), out)
    assert (out == 7).all()


def test_encoding_at_a_low_rate_takes_little_memory() -> None:
    # 1,000,000 parameters: 4 MB of float32.
    schema = schema_of((1000, 1000))
    delta = np.random.default_rng(7).standard_normal(1_000_000).astype(np.float32)
    payload = ECSQ.encode(delta, schema)
    out = np.zeros(1_000_000, np.float32)
    tracemalloc.start()
    ECSQ.encode(delta, schema)
    encode_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    ECSQ.decode(payload, schema, out)
    decode_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encode_peak < 6_000_000
    assert decode_peak < 6_500_000


@pytest.mark.parametrize("shape", [(300_000,), (600, 500)])
def test_the_finest_step_takes_little_memory(shape: tuple[int, ...]) -> None:
    schema = schema_of(shape)
    delta = np.random.default_rng(9).standard_normal(300_000).astype(np.float32)
    delta[7] = 100
    request = Request(Rate(step=FINEST_STEP))
    payload = ECSQ.encode(delta, schema, request)
    tracemalloc.start()
    ECSQ.encode(delta, schema, request)
    encode_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    ECSQ.decode(payload, schema)
    decode_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encode_peak < 6 * 4 * 300_000
    assert decode_peak < 2 * 4 * 300_000


def test_more_levels_beyond_int16_than_any_delta_has_are_rejected() -> None:
    # 1000 // 512 + 1 = 2 of 1000 may be.
    schema = schema_of((1000,))
    for large in (2, 3):
        levels = np.ones(1000, np.int32)
        levels[:large] = 40_000
        payload = bytes.fromhex("007f") + encode_tensors([levels], schema, BitWriter())
        if large == 2:
            assert np.count_nonzero(ECSQ.decode(payload, schema) > 1000) == 2
        else:
            with pytest.raises(MalformedPayload, match="more than 2 coefficients"):
                ECSQ.decode(payload, schema)


# Bytes that are out there


def test_the_golden_bytes_of_a_network_decode_to_the_golden_values_to_the_bit() -> None:
    """What the golden vector does not have: matrices. The values were made once, by other means."""
    payload = (GOLDEN / "ecsq.network.bin").read_bytes()
    decoded = ECSQ.decode(payload, schema_of((40, 24), (40,), (10, 40)))
    assert decoded.astype("<f4").tobytes() == (GOLDEN / "ecsq.network.decoded.bin").read_bytes()
