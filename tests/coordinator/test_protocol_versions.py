"""A coordinator beside devices of another version of the protocol, and with clocks that jump or leap."""

import asyncio
from collections import Counter

import pytest
from small_fleet import DEVICES, Bench, make_update
from test_coordinator_service import make, run, update

from coordinator.federated import FederatedEvaluations
from coordinator.fleet_view import FleetView
from coordinator.intake import Refused
from coordinator.staleness import Constant
from coordinator.status import DeviceTrouble
from fedtide.wire import frame
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.clock import SYSTEM_CLOCK
from fedtide.wire.envelope import update_digest
from fedtide.wire.messages import Presence, Reason, TrainingEvent, Verdict

DEVICE = DEVICES[0]
PRESENCE = frame.to_frame(Presence(online=True, boot="b", protocol=1))


def in_version(number, whole):
    """The frame of a build that speaks another version, as far as this one can tell."""
    return bytes((number,)) + whole[1:]


def shown(view):
    (status,) = view.statuses([DEVICE], {})
    return status.trouble


@pytest.mark.parametrize(("number", "older"), [(2, "receiver"), (255, "receiver"), (0, "sender")])
def test_a_device_whose_presence_is_in_another_version_is_shown_with_who_has_to_upgrade(number, older):
    view = FleetView(FederatedEvaluations(100))
    view.note_presence(DEVICE, in_version(number, PRESENCE))
    assert shown(view) == DeviceTrouble(
        event="protocol.unsupported",
        detail=f"its presence was sent in protocol version {number}; the receiver speaks 1: "
        f"upgrade fedtide at the {older}",
        version=None,
    )
    assert (view.trouble_counts, view.malformed) == ({"protocol.unsupported": 1}, 1)


def test_the_trouble_ends_with_a_presence_that_can_be_read():
    view = FleetView(FederatedEvaluations(100))
    view.note_presence(DEVICE, in_version(2, PRESENCE))
    view.note_presence(DEVICE, PRESENCE)
    assert shown(view) is None
    (status,) = view.statuses([DEVICE], {})
    assert status.online


def test_other_trouble_is_not_ended_by_a_presence():
    view = FleetView(FederatedEvaluations(100))
    view.troubles[DEVICE] = DeviceTrouble(event="data.unusable", detail="", version=None)
    view.note_presence(DEVICE, PRESENCE)
    assert shown(view).event == "data.unusable"


def test_events_of_another_version_are_counted_and_change_nothing():
    view = FleetView(FederatedEvaluations(100))
    event = frame.to_frame(TrainingEvent(version=1, num_examples=1, steps=1, seconds=1.0, loss=0.5))
    view.note_event(DEVICE, in_version(2, event), 1)
    assert (view.malformed, view.events, shown(view)) == (1, {}, None)


@pytest.mark.parametrize("number", [0, 2, 255])
def test_a_chunk_of_another_version_is_rejected_with_its_reason_and_moves_no_mark(tmp_path, number):
    bench = Bench(tmp_path)
    (chunk,) = update_chunks(make_update(), 1, MAX_CHUNK_BYTES)
    message = in_version(number, chunk)
    refused = bench.receive(DEVICE, message)
    (receipt,) = bench.judge(refused)
    bench.close()
    assert isinstance(refused, Refused)
    assert (receipt.reason, receipt.counter, receipt.digest) == (
        Reason.UNSUPPORTED_VERSION,
        0,
        update_digest(message),
    )
    assert f"protocol version {number}; the receiver speaks 1" in receipt.detail
    assert bench.writer.marks == {}
    assert bench.accounting.rejected == {Reason.UNSUPPORTED_VERSION: 1}


def test_an_envelope_of_another_version_in_a_chunk_of_this_one_is_rejected_with_its_digest(tmp_path):
    bench = Bench(tmp_path)
    envelope = in_version(2, make_update())
    (chunk,) = update_chunks(envelope, 1, MAX_CHUNK_BYTES)
    (receipt,) = bench.judge(bench.receive(DEVICE, chunk))
    bench.close()
    assert (receipt.reason, receipt.counter, receipt.digest) == (
        Reason.UNSUPPORTED_VERSION,
        1,
        update_digest(envelope),
    )


def test_a_receipt_tells_the_highest_counter_that_was_judged(tmp_path):
    bench = Bench(tmp_path)
    receipts = bench.send(make_update(counter=7), make_update(counter=3), make_update(counter=7))
    bench.close()
    assert [(receipt.counter, receipt.highest) for receipt in receipts] == [(7, 7), (3, 7), (7, 7)]
    assert receipts[1].reason is Reason.REPLAYED_COUNTER


def test_an_operator_sees_a_device_that_was_upgraded_first(tmp_path):
    async def scenario(fleet, _running):
        fleet.connection.deliver(f"fl/1/pumps/st/{DEVICE}", in_version(2, PRESENCE))
        await fleet.connection.until(lambda: len(fleet.connection.acknowledged) == 1)
        return fleet.service.status("running")

    (seen, *others) = run(tmp_path, make(), scenario).outcome.devices
    assert seen.trouble.event == "protocol.unsupported"
    assert [each.trouble for each in others] == [None] * 3


TEN_YEARS_S = 10 * 365.25 * 86_400


class JumpingClock:
    """Runs evenly, and shows whatever date a test sets."""

    def __init__(self):
        self.date = 1_700_000_000.0

    def now(self):
        return SYSTEM_CLOCK.now()

    def wall(self):
        return self.date


@pytest.mark.parametrize("jump_s", [-TEN_YEARS_S, TEN_YEARS_S], ids=["ten years back", "ten years ahead"])
def test_a_clock_that_jumps_during_a_run_of_the_coordinator_harms_nothing(tmp_path, jump_s):
    clock = JumpingClock()

    async def scenario(fleet, _running):
        for counter in (1, 2, 3):
            fleet.send(update(counter))
            await fleet.connection.until(lambda done=counter: len(fleet.received(DEVICE)) == done)
            clock.date += jump_s if counter % 2 else -jump_s
        # The head is issued anew: its date would be a lie for as long as the jump was wide.
        await fleet.connection.until(lambda: fleet.heads()[-1].issued == clock.date)
        assert fleet.heads()[-1].expires == clock.date + 7 * 86_400

    settings = make(staleness=Constant())
    fleet = run(tmp_path, settings, scenario, clock=clock)
    assert [receipt.verdict for receipt in fleet.received(DEVICE)] == [Verdict.APPLIED] * 3
    assert fleet.service.committer.committed.version == 3


class LeapingClock:
    """Runs evenly, and is ahead by whatever a test adds."""

    def __init__(self):
        self.ahead_s = 0.0

    def now(self):
        return SYSTEM_CLOCK.now() + self.ahead_s

    def wall(self):
        return SYSTEM_CLOCK.wall()


def test_where_nobody_is_heard_of_everything_is_offered_again_ever_more_rarely(tmp_path):
    """A broker that lives may have lost the head, or keep damaged chunks: then no device can do anything."""
    clock = LeapingClock()

    async def scenario(fleet, _running):
        await fleet.connection.until(fleet.heads)
        for times, quiet_s in enumerate((60, 120, 240), start=2):
            clock.ahead_s += quiet_s - 30
            await asyncio.sleep(0.6)  # two looks, at which it is not due
            assert len(fleet.heads()) == times - 1
            clock.ahead_s += 30
            await fleet.connection.until(lambda done=times: len(fleet.heads()) == done)
        chunks = Counter(topic for topic in fleet.connection.topics() if "/b/" in topic)
        assert set(chunks.values()) == {4}

    run(tmp_path, make(), scenario, clock=clock)
