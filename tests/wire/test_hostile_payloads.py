"""Mutated bytes of every format: a documented rejection or a finite result, for little memory and time.

``make test-long`` makes a million of them and prints what each format took.
"""

import contextlib
import random
import time
import tracemalloc
from itertools import islice
from typing import Any, Final

import numpy as np
import pytest
from forged_payloads import forged_lowrank
from hostile_subjects import LARGE, NAMES, SMALL, Subject, deltas, large, subject_of

from fedtide.wire import frame
from fedtide.wire.codecs import CODECS
from fedtide.wire.envelope import UpdateHeader
from fedtide.wire.errors import MalformedFrame, WireError
from fedtide.wire.messages import DeviceEvent, Head, Presence, UpdateChunk
from fedtide.wire.model_blob import DeltaIndex, ModelBlob

A_FEW: Final = 250
"""Of each subject, in the normal run."""
A_MILLION: Final = 1_000_000
"""Of all subjects together, in the long run."""
BATCH: Final = 100
LONGEST_MEAN_MS: Final = 1.0
LEAN: Final = 2.0
"""Peak memory over the configured maximum, at most."""

every_subject = pytest.mark.parametrize("subject", NAMES, indirect=True)
every_large_codec = pytest.mark.parametrize("large_codec", CODECS, indirect=True)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """One reader of a stranger's bytes."""
    return subject_of(request.param)


@pytest.fixture
def large_codec(request: pytest.FixtureRequest) -> Subject:
    """One codec at many parameters."""
    return large(request.param)


def shown(content: bytes) -> str:
    """Enough to write a failing test from."""
    return f"{len(content)} bytes: {content[:400].hex()}"


def take(subject: Subject, content: bytes) -> bool:
    """As the subject does, and name the bytes if something unexpected comes out."""
    try:
        return subject.take(content)
    except Exception as error:
        raise AssertionError(f"{subject.name} fails on {shown(content)}") from error


@every_subject
def test_every_seed_is_accepted(subject: Subject) -> None:
    assert subject.seeds
    assert all(take(subject, seed) for seed in subject.seeds)


@every_subject
def test_mutated_bytes_are_rejected_as_documented_or_give_a_finite_result(subject: Subject) -> None:
    draw = random.Random(4)
    accepted = [take(subject, subject.hostile(draw)) for _ in range(A_FEW)]
    assert not all(accepted), "no mutation was noticed at all"


@every_subject
def test_every_truncation_of_a_seed_is_survived(subject: Subject) -> None:
    for seed in subject.seeds[:4]:
        for length in range(0, len(seed), 1 + len(seed) // 60):
            take(subject, seed[:length])


@every_subject
def test_a_seed_with_trailing_bytes_is_rejected(subject: Subject) -> None:
    for seed in subject.seeds:
        for tail in (b"\0", b"\xff", b"\x80" * 9, seed):
            if tail:
                assert not take(subject, seed + tail)


@every_subject
def test_input_longer_than_the_maximum_is_rejected(subject: Subject) -> None:
    for seed in subject.seeds:
        assert not take(subject, seed + bytes(subject.most_bytes))


def peak_bytes(subject: Subject, content: bytes) -> int:
    """What one reading takes beyond its input, its result included. ``tracemalloc`` must be on."""
    assert subject.read is not None
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with contextlib.suppress(WireError):
        subject.read(content)
    return tracemalloc.get_traced_memory()[1] - before


def peaks(subject: Subject, contents: list[bytes]) -> list[int]:
    """Of each content, after one reading that fills whatever is kept."""
    tracemalloc.start()
    try:
        peak_bytes(subject, contents[0])
        return [peak_bytes(subject, content) for content in contents]
    finally:
        tracemalloc.stop()


def shares(subject: Subject, contents: list[bytes]) -> list[float]:
    """Peak memory of each content over the configured maximum.

    That is the longest payload accepted, or the float32 result if it is more: 1.05 MB here.
    """
    return [peak / subject.most_bytes for peak in peaks(subject, contents)]


@every_large_codec
def test_decoding_takes_less_than_twice_the_configured_maximum(large_codec: Subject) -> None:
    assert max(shares(large_codec, list(large_codec.seeds))) < LEAN


@every_large_codec
def test_decoding_at_a_codecs_own_step_takes_less_than_twice_the_maximum(large_codec: Subject) -> None:
    codec = CODECS[large_codec.name]
    usual = [codec.encode(delta, LARGE) for delta in islice(deltas(LARGE), 2)]
    assert max(shares(large_codec, usual)) < LEAN


@every_large_codec
def test_hostile_bytes_take_less_than_twice_the_configured_maximum(large_codec: Subject) -> None:
    draw = random.Random(5)
    assert max(shares(large_codec, [large_codec.hostile(draw) for _ in range(20)])) < LEAN


def test_a_forged_payload_with_a_table_for_each_class_takes_no_more_than_others() -> None:
    # These two took 2.16 times the maximum while every table was kept for decoding, and once more joined.
    forged = [forged_lowrank(LARGE, random.Random(number)) for number in (172, 203)]
    assert max(shares(large("lowrank"), forged)) < 1.5


@pytest.mark.parametrize(
    "kind", [UpdateChunk, UpdateHeader, Presence, Head, ModelBlob, DeltaIndex, DeviceEvent]
)
@pytest.mark.parametrize(
    "value", [b"\x80", b"\x90", b"\xa0", b"\xc0"], ids=["maps", "arrays", "texts", "nothings"]
)
def test_a_message_of_many_small_values_takes_no_more_memory_than_its_bytes(kind: Any, value: bytes) -> None:
    # An empty map is one byte on the wire and 64 as a Python object.
    read: Any = frame.from_frame_any if kind is DeviceEvent else frame.from_frame
    many = b"\xdd" + (60_000).to_bytes(4, "big") + value * 60_000
    for content in (b"\x01" + many, b"\x01\x81\xa1n" + many, b"\x01\x95" + many * 5):
        tracemalloc.start()
        try:
            with pytest.raises(MalformedFrame):
                read(content, kind, len(content))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < len(content)


@every_large_codec
def test_a_short_payload_that_claims_much_is_rejected_for_little(large_codec: Subject) -> None:
    """Bombs: a header followed by next to nothing."""
    for seed in large_codec.seeds:
        for kept in (4, 8, 16, 32):
            for fill in (b"", b"\0" * 40, b"\xff" * 40, b"\x80" * 40, b"\x7f" * 40):
                take(large_codec, seed[:kept] + fill)


def test_the_schemas_have_the_sizes_their_texts_say() -> None:
    # 32*25 + 32 + 500*512 + 500 + 10*500 + 10, and 6*9 + 6 + 12*40 + 12 + 10*12 + 10 + 1.
    assert LARGE.size == 262_342
    assert SMALL.size == 683


@pytest.mark.long
def test_a_million_mutations_give_nothing_but_documented_errors_in_a_millisecond_each() -> None:
    each = -(-A_MILLION // len(NAMES))
    total_s, count = 0.0, 0
    for subject in map(subject_of, NAMES):
        draw = random.Random(6)
        spent_s, longest_s, accepted = 0.0, 0.0, 0
        for _ in range(-(-each // BATCH)):
            contents = [subject.hostile(draw) for _ in range(BATCH)]
            before = time.process_time()
            accepted += sum(take(subject, content) for content in contents)
            took_s = time.process_time() - before
            spent_s, longest_s, count = spent_s + took_s, max(longest_s, took_s), count + BATCH
        total_s += spent_s
        print(
            f"{subject.name}: {each:,} mutations, {accepted / each:.1%} accepted, mean "
            f"{1e6 * spent_s / each:.0f} µs, slowest batch {1e6 * longest_s / BATCH:.0f} µs each"
        )
    mean_ms = 1000 * total_s / count
    print(f"{count:,} mutations, mean {mean_ms:.3f} ms of CPU")
    assert count >= A_MILLION
    assert mean_ms < LONGEST_MEAN_MS


@pytest.mark.long
@every_large_codec
def test_no_mutation_of_large_payloads_takes_twice_the_configured_maximum(
    large_codec: Subject,
) -> None:
    draw = random.Random(7)
    worst = 0.0
    for _ in range(50):
        worst = max(worst, *shares(large_codec, [large_codec.hostile(draw) for _ in range(20)]))
    print(f"{large_codec.name}: peak {worst:.2f} of the maximum")
    assert worst < LEAN


def test_a_subject_that_lets_an_error_through_is_found() -> None:
    def careless(content: bytes) -> bool:
        return bool(np.frombuffer(content, np.float32).size)

    subject = Subject("careless", (bytes(8),), careless, 8)
    draw = random.Random(8)
    hostile = [subject.hostile(draw) for _ in range(100)]
    with pytest.raises(AssertionError, match="careless fails on"):
        [take(subject, content) for content in hostile]
