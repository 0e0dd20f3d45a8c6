"""Bad input at the coordinator's door: one reason each, nothing folded, nothing kept, the model untouched."""

import pytest
from hostile_updates import CASES, NEED_A_HISTORY, Forger, names
from hypothesis import given
from hypothesis import strategies as st
from small_fleet import (
    DEVICES,
    FLEET,
    PLAN,
    SCHEMA,
    assert_same_state,
    device_key,
    make_settings,
    make_update,
)

from coordinator.accounting import REJECTED
from coordinator.aggregation import FedBuff
from coordinator.intake import MAX_CHUNK_FRAME_BYTES, Arrived, Intake, Refused
from coordinator.model_state import ModelState
from coordinator.settings import Update
from coordinator.staleness import Cutoff
from fedtide.wire import frame
from fedtide.wire.chunks import update_chunks
from fedtide.wire.envelope import update_digest
from fedtide.wire.messages import Reason, UpdateChunk, Verdict
from fedtide.wire.parameters import fingerprint

PUMP = DEVICES[1]
STRANGER = "stranger"


def forger(counter=1, device=PUMP):
    return Forger(
        fleet=FLEET,
        plan=PLAN.plan.id,
        schema=SCHEMA,
        device=device,
        key=device_key(device),
        base_version=0,
        base_sha256=fingerprint(PLAN.initial),
        counter=counter,
    )


def a_copy(state):
    """A state whose arrays the coordinator cannot reach."""
    total = state.buffer.total.copy()
    buffer = type(state.buffer)(total, state.buffer.divisor, state.buffer.count)
    return ModelState(state.version, state.parameters.copy(), buffer, state.optimizer, state.rules)


@pytest.fixture
def half_full(open_bench):
    """One honest update of another device has been folded; the next would make a version."""
    bench = open_bench(make_settings(aggregator=FedBuff(goal=2)))
    bench.send(make_update())
    return bench


def assert_rejected(bench, case_messages, reason, *, sender=PUMP, receipt=True):
    before, entries = a_copy(bench.state), len(list(bench.journal.entries_after(0)))
    counted = bench.journal.totals().get(REJECTED + reason, 0)

    (arrival,) = [bench.receive(sender, message) for message in case_messages]
    (answer,) = bench.judge(arrival)

    if receipt:
        assert (answer.device, answer.verdict, answer.reason) == (sender, Verdict.REJECTED, reason)
        assert answer.detail
    else:
        assert answer is None
    assert bench.journal.totals()[REJECTED + reason] == counted + 1
    assert bench.accounting.balanced()
    assert len(list(bench.journal.entries_after(0))) == entries
    assert_same_state(bench.state, before)
    assert bench.intake.assembler.held_bytes == 0
    return answer


@pytest.mark.parametrize("case", CASES, ids=names)
def test_a_bad_update_is_refused_with_its_reason_and_leaves_no_trace(half_full, case):
    assert_rejected(half_full, case.messages(forger()), case.reason, receipt=case.receipt)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_after_a_bad_update_the_same_device_is_served_as_before(half_full, case):
    assert_rejected(half_full, case.messages(forger()), case.reason, receipt=case.receipt)
    (receipt,) = half_full.send(make_update(device=PUMP, counter=2))
    assert receipt.verdict is Verdict.APPLIED
    assert half_full.state.version == 1


@pytest.mark.parametrize("case", CASES, ids=names)
def test_a_stranger_hears_only_that_it_is_one(half_full, case):
    """It cannot find out more. What is no chunk at all is refused before the roster is asked."""
    answers = [half_full.receive(STRANGER, message) for message in case.messages(forger(device=STRANGER))]
    reasons = {answer.rejection.reason for answer in answers}
    unreadable = {Reason.MALFORMED, Reason.TOO_LARGE, Reason.UNSUPPORTED_VERSION}
    assert reasons <= {Reason.UNKNOWN_DEVICE} | ({case.reason} & unreadable)


def test_an_honest_update_of_a_stranger_is_refused(half_full):
    message = forger(device=STRANGER).chunks(forger(device=STRANGER).envelope())
    answer = assert_rejected(half_full, message, Reason.UNKNOWN_DEVICE, sender=STRANGER)
    assert "fedtide enrol stranger" in answer.detail
    assert answer.retry_after_s >= 10.0  # the operator needs a moment
    assert STRANGER not in half_full.journal.marks()


def test_a_counter_that_was_overtaken_is_refused(half_full):
    half_full.send(make_update(device=PUMP, counter=9))
    assert half_full.state.version == 1
    answer = assert_rejected(half_full, forger(8).chunks(forger(8).envelope()), Reason.REPLAYED_COUNTER)
    assert "after counter 9" in answer.detail


def test_an_update_that_is_too_stale_is_refused(open_bench):
    bench = open_bench(make_settings(aggregator=FedBuff(goal=1), staleness=Cutoff(at=1)))
    bench.send(make_update(counter=1), make_update(counter=2))
    assert_rejected(bench, forger().chunks(forger().envelope()), Reason.TOO_STALE)


def test_an_update_after_the_stop_is_refused(half_full):
    half_full.writer.stopped = True
    assert_rejected(half_full, forger().chunks(forger().envelope()), Reason.STOPPED)


def test_every_reason_there_is_has_a_case_above():
    assert {case.reason for case in CASES} | NEED_A_HISTORY == set(Reason)


def test_a_receipt_for_a_refused_update_names_the_bytes_that_were_refused(half_full):
    envelope = forger().envelope(key=device_key("somebody-else"))
    answer = assert_rejected(half_full, forger().chunks(envelope), Reason.BAD_SIGNATURE)
    assert answer.digest == update_digest(envelope)
    assert answer.counter == 1


def test_damage_on_the_way_does_not_use_up_the_counter(half_full):
    envelope = forger().envelope()
    damaged = envelope[:-1] + bytes([envelope[-1] ^ 1])
    assert_rejected(half_full, forger().chunks(damaged), Reason.MALFORMED, receipt=False)
    (receipt,) = half_full.judge(half_full.receive(PUMP, forger().chunks(envelope)[0]))
    assert receipt.verdict is Verdict.APPLIED


@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_no_flipped_byte_makes_another_update_of_an_honest_one(place, flip):
    intake = Intake(SCHEMA, lambda _device: device_key(PUMP).public, 1 << 20)
    (message,) = forger().chunks(forger().envelope())
    place %= len(message)
    changed = message[:place] + bytes([message[place] ^ flip]) + message[place + 1 :]
    assert not isinstance(intake.receive(PUMP, changed, 0.0), Arrived)


@given(st.binary(max_size=300))
def test_noise_is_refused_and_never_raises(noise):
    intake = Intake(SCHEMA, lambda _device: device_key(PUMP).public, 1 << 20)
    for payload in (noise, b"\x01" + noise, forger().chunks(b"\x01" + noise)[0]):
        assert isinstance(intake.receive(PUMP, payload, 0.0), Refused)
    assert intake.assembler.held_bytes == 0


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 3, 0, 0, 2]])
def test_chunks_make_one_update_in_whatever_order_and_however_often_they_come(bench, order):
    envelope = forger().envelope(metrics={"m" * 2000: 0.0})
    chunks = update_chunks(envelope, 1, -(-len(envelope) // 4))
    assert len(chunks) == 4
    arrivals = [bench.receive(PUMP, chunks[index]) for index in order]
    assert arrivals[:-1] == [None] * (len(order) - 1)
    assert arrivals[-1].raw == envelope
    assert bench.intake.assembler.held_bytes == 0


def announced(counter, size_bytes, content):
    """The first of many chunks of an envelope that will never be whole."""
    return frame.to_frame(
        UpdateChunk(
            counter=counter,
            digest=bytes(32),
            size_bytes=size_bytes,
            index=0,
            count=10,
            content=content,
        )
    )


def test_what_is_held_of_unfinished_updates_is_bounded():
    """8 parameters, float32: an envelope has at most 32 + 8192 + 81 bytes or so. Room for about three."""
    room = 25_000
    intake = Intake(SCHEMA, lambda device: device_key(device).public, room)
    for number in range(200):
        assert intake.receive(f"pump-{number}", announced(1, 8000, bytes(7000)), float(number)) is None
        assert intake.assembler.held_bytes <= room
    assert intake.assembler.held_bytes == 21_000


def test_one_device_holds_one_unfinished_update():
    intake = Intake(SCHEMA, lambda device: device_key(device).public, 1 << 20)
    for counter in range(100):
        assert intake.receive(PUMP, announced(counter, 8000, bytes(7000)), 0.0) is None
    assert intake.assembler.held_bytes == 7000


def test_the_largest_chunk_frame_is_parsed_and_one_byte_more_is_not():
    intake = Intake(SCHEMA, lambda device: device_key(device).public, 1 << 20)
    fitting = intake.receive(PUMP, bytes([1]) * MAX_CHUNK_FRAME_BYTES, 0.0)
    larger = intake.receive(PUMP, bytes([1]) * (MAX_CHUNK_FRAME_BYTES + 1), 0.0)
    assert fitting.rejection.reason is Reason.MALFORMED
    assert larger.rejection.reason is Reason.TOO_LARGE


def test_the_bound_never_keeps_out_a_single_honest_update(open_bench):
    bench = open_bench(make_settings(update=Update(max_partial_bytes=1)))
    envelope = make_update(metrics={"m" * 7000: 0.0})
    *first, last = update_chunks(envelope, 1, 1000)
    assert [bench.receive(DEVICES[0], chunk) for chunk in first] == [None] * len(first)
    assert bench.intake.assembler.held_bytes == 1000 * len(first)
    assert bench.receive(DEVICES[0], last).raw == envelope


def test_more_crumbs_than_a_512th_of_the_envelope_are_refused():
    intake = Intake(SCHEMA, lambda device: device_key(device).public, 1 << 20)
    # 5120 bytes / 512 = 10 chunks, and one for the rest
    assert intake.receive(PUMP, forger().chunk(count=11, size_bytes=5120), 0.0) is None
    refused = intake.receive(PUMP, forger().chunk(count=12, size_bytes=5120), 0.0)
    assert refused.rejection.reason is Reason.MALFORMED
    assert "12 chunks for 5,120 bytes; chunks hold at least 512 bytes" in refused.rejection.detail
