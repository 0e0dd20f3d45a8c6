"""Back-pressure at the coordinator: one update per device in line, a share for each, a pace for all."""

import asyncio

import msgspec
import pytest
from recording_connection import RecordingConnection
from small_fleet import DEVICES, FLEET, PLAN, Bench, make_update
from test_coordinator_service import COORDINATOR, KEY, make, run, update

from coordinator import reception
from coordinator.intake import Refused
from coordinator.line import Waiting
from coordinator.settings import Journal, Pacing, Share, Stop
from fedtide.wire import frame
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.envelope import update_digest
from fedtide.wire.link import Delivery
from fedtide.wire.messages import CoordinatorState, Presence, Reason, TrainingEvent, UpdateChunk, Verdict
from fedtide.wire.parameters import fingerprint
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import COORDINATOR_DOMAIN

ONE, TWO, THREE = DEVICES[:3]
UP = f"fl/1/{FLEET}/up/0/{ONE}"


def states(connection):
    """What the coordinator has said of itself, oldest first."""
    return [
        unseal(sealed, CoordinatorState, KEY.public, COORDINATOR_DOMAIN)
        for sealed in connection.payloads(COORDINATOR)
    ]


async def settled(fleet):
    """Nothing waits, and what was dropped is counted durably."""
    async with asyncio.timeout(10):
        while fleet.connection._inbox.qsize() or fleet.service.committer.accounting.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# One update per device waits.


def test_a_second_update_of_a_device_whose_first_one_waits_is_left_and_counted(tmp_path):
    async def scenario(fleet, _running):
        fleet.send(update(1), update(2), update(1, TWO))
        await fleet.connection.until(lambda: fleet.received(ONE) and fleet.received(TWO))
        await settled(fleet)
        return fleet.service.status("running").updates

    fleet = run(tmp_path, make(goal=10), scenario)
    updates = fleet.outcome
    assert (updates.received, updates.applied, updates.rejected) == (3, 2, {"too-many": 1})
    assert [receipt.counter for receipt in fleet.received(ONE)] == [1]
    assert len(fleet.connection.acknowledged) == 3
    assert fleet.in_the_journal() == [1, 1]


def test_what_was_left_counts_when_it_is_sent_again(tmp_path):
    async def scenario(fleet, _running):
        fleet.send(update(1), update(2))
        await fleet.connection.until(lambda: fleet.received(ONE))
        fleet.send(update(2))
        await fleet.connection.until(lambda: len(fleet.received(ONE)) == 2)

    fleet = run(tmp_path, make(goal=10), scenario)
    assert [receipt.verdict for receipt in fleet.received(ONE)] == [Verdict.APPLIED] * 2
    assert fleet.in_the_journal() == [1, 2]


def test_the_same_update_twice_in_line_is_a_duplicate_with_one_receipt(tmp_path):
    async def scenario(fleet, _running):
        fleet.send(update(1), update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))
        await settled(fleet)
        return fleet.service.status("running").updates

    fleet = run(tmp_path, make(goal=10), scenario)
    assert (fleet.outcome.received, fleet.outcome.applied, fleet.outcome.duplicate) == (2, 1, 1)
    assert [receipt.verdict for receipt in fleet.received(ONE)] == [Verdict.APPLIED]


def test_one_that_comes_again_over_a_new_connection_is_answered_there(tmp_path):
    async def scenario(fleet, _running):
        arrival = fleet.service._reception._intake.receive(
            ONE, update_chunks(update(1)[2], 1, MAX_CHUNK_BYTES)[0], 0.0
        )
        lost = RecordingConnection()
        lost.lose()
        delivery = Delivery(UP, b"again", 1, 1, retained=False)
        committer = fleet.service.committer
        committer.put(Waiting(arrival, delivery, lost))
        committer.put(Waiting(arrival, delivery, fleet.connection))
        await fleet.connection.until(lambda: fleet.received(ONE))
        await settled(fleet)
        return fleet.service.status("running").updates

    fleet = run(tmp_path, make(goal=10), scenario)
    assert (fleet.outcome.applied, fleet.outcome.duplicate) == (1, 1)
    assert [receipt.verdict for receipt in fleet.received(ONE)] == [Verdict.DUPLICATE]


def test_what_was_dropped_is_on_record_after_a_restart(tmp_path):
    async def drop_some(fleet, _running):
        fleet.send(update(1), update(2), update(3), update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))
        await settled(fleet)

    async def look(fleet, _running):
        return fleet.service.status("running").updates

    run(tmp_path, make(goal=10), drop_some)
    updates = run(tmp_path, make(goal=10), look).outcome
    assert (updates.received, updates.applied, updates.duplicate) == (4, 1, 1)
    assert updates.rejected == {"too-many": 2}


def test_at_the_end_nothing_that_still_comes_keeps_the_broker_from_being_heard(tmp_path):
    """While the last version is on its way, more updates come than there is room for."""
    settings = msgspec.structs.replace(make(Stop(updates=1), goal=1), journal=Journal(max_batch=2))

    async def scenario(fleet, running):
        connection = fleet.connection
        gate = connection.hold("model/head")
        fleet.send(update(1))
        await connection.until(lambda: fleet.received(ONE))
        async with asyncio.timeout(10):
            while not fleet.service._writer.stopped or fleet.service.committer.accounting.waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # the committer has ended
            for counter in range(2, 7):
                fleet.send(*(update(counter, device) for device in DEVICES))
            while connection._inbox.qsize():  # noqa: ASYNC110 - at a full inbox nothing more is read
                await asyncio.sleep(0.01)
        gate.set()
        assert await running == "updates reached 1"

    fleet = run(tmp_path, settings, scenario)
    assert fleet.heads()[-1].version == 1
    assert len(fleet.connection.acknowledged) == 1
    assert fleet.service.committer.accounting.balanced()


def test_what_waits_is_bounded_in_bytes_too(tmp_path):
    """Each update is larger than half of a batch, so that each has one to itself."""
    size_bytes = len(update(1)[2])
    bounds = Journal(max_batch_bytes=size_bytes * 2 - 1)

    async def scenario(fleet, _running):
        committer, batches = fleet.service.committer, []
        judge, most = fleet.service._writer.judge, 0

        def counted(arrivals):
            nonlocal most
            most = max(most, len(committer._line._waiting))
            batches.append(len(arrivals))
            return judge(arrivals)

        fleet.service._writer.judge = counted
        fleet.send(*(update(1, device) for device in DEVICES))
        await fleet.connection.until(lambda: all(fleet.received(device) for device in DEVICES))
        return batches, most

    settings = msgspec.structs.replace(make(goal=10), journal=bounds)
    assert run(tmp_path, settings, scenario).outcome == ([1, 1, 1, 1], 1)


def test_strangers_of_another_build_take_no_more_memory_than_others(tmp_path, monkeypatch):
    monkeypatch.setattr(reception, "_MAX_PENDING_KEYS", 3)
    newer = b"\x63" + frame.to_frame(Presence(online=True, boot="a"))[1:]

    async def scenario(fleet, _running):
        for number in range(50):
            fleet.connection.deliver(f"fl/1/pumps/st/stranger-{number}", newer)
        await settled(fleet)
        await fleet.connection.until(lambda: len(fleet.connection.acknowledged) == 50)
        return fleet.service._reception.view

    settings = msgspec.structs.replace(make(goal=10), max_devices=4)
    assert len(run(tmp_path, settings, scenario).outcome.troubles) == 7


# A share for each.

SMALL_SHARE = Share(messages_per_s=0.001, burst_messages=10)


def test_a_device_that_never_stops_is_dropped_unread_and_told_once(tmp_path):
    async def scenario(fleet, _running):
        read = 0
        intake = fleet.service._reception._intake
        receive = intake.receive

        def counted(*arguments):
            nonlocal read
            read += 1
            return receive(*arguments)

        intake.receive = counted
        for _ in range(500):
            fleet.connection.deliver(UP, b"\x01 garbage")
        fleet.send(update(1, TWO))
        await fleet.connection.until(lambda: fleet.received(TWO))
        await settled(fleet)
        return read, fleet.service.status("running").updates

    fleet = run(tmp_path, make(goal=10, share=SMALL_SHARE), scenario)
    read, updates = fleet.outcome
    assert read == 10 + 1  # the burst of one, and the update of the other
    assert updates.rejected == {"malformed": 10, "too-many": 490}
    assert (updates.received, updates.applied) == (501, 1)
    (told,) = [receipt for receipt in fleet.received(ONE) if receipt.reason is Reason.TOO_MANY]
    assert (told.verdict, told.retry_after_s, told.counter) == (Verdict.REJECTED, 60.0, 0)
    assert len(fleet.connection.acknowledged) == 501


def test_who_is_told_that_it_sends_too_much_keeps_its_update(tmp_path):
    """The receipt names nothing that any update could be."""

    async def scenario(fleet, _running):
        for _ in range(20):
            fleet.connection.deliver(UP, b"")
        fleet.send(update(1))
        await fleet.connection.until(
            lambda: any(receipt.reason is Reason.TOO_MANY for receipt in fleet.received(ONE))
        )
        await settled(fleet)

    fleet = run(tmp_path, make(goal=10, share=SMALL_SHARE), scenario)
    assert {receipt.digest for receipt in fleet.received(ONE)} == {update_digest(b""), bytes(32)}
    assert fleet.in_the_journal() == []


def test_strangers_share_one_and_are_not_told(tmp_path):
    async def scenario(fleet, _running):
        for number in range(100):
            fleet.connection.deliver(f"fl/1/pumps/up/0/stranger-{number}", b"")
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))
        await settled(fleet)
        return fleet.service.status("running").updates, len(fleet.service._reception._shares)

    fleet = run(tmp_path, make(goal=10, share=SMALL_SHARE), scenario)
    updates, buckets = fleet.outcome
    assert updates.rejected == {"malformed": 10, "too-many": 90}
    assert buckets == 2  # theirs, and the device's
    assert fleet.received(ONE)[0].verdict is Verdict.APPLIED


def test_presence_and_events_have_a_share_that_leaves_updates_theirs(tmp_path):
    presence = frame.to_frame(Presence(online=True, boot="a"))
    event = frame.to_frame(TrainingEvent(version=0, num_examples=5, steps=1, seconds=0.1, loss=1.25))

    async def scenario(fleet, _running):
        connection = fleet.connection
        for _ in range(50):
            connection.deliver(f"fl/1/pumps/st/{ONE}", presence)
            connection.deliver(f"fl/1/pumps/ev/{ONE}", event, qos=0)
        await connection.until(lambda: len(connection.acknowledged) == 100)
        fleet.send(update(1))
        await connection.until(lambda: fleet.received(ONE))
        return fleet.service.status("running").ignored_messages

    fleet = run(tmp_path, make(share=SMALL_SHARE), scenario)
    assert fleet.outcome == 90
    assert fleet.received(ONE)[0].verdict is Verdict.APPLIED


# A pace for all.


def test_a_small_fleet_is_not_told_to_spread_or_to_rest(tmp_path):
    async def scenario(fleet, _running):
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))

    fleet = run(tmp_path, make(goal=10), scenario)
    assert [state.spread_s for state in states(fleet.connection)] == [0.0, 0.0]  # online, offline
    assert fleet.received(ONE)[0].retry_after_s == 0.0


def test_whoever_may_come_back_at_once_is_told_how_long_to_spread_with_the_first_word(tmp_path):
    """Four devices, of which one may come at once: three at half of 2 a second."""

    async def scenario(fleet, _running):
        return unseal(fleet.sessions[0].will.payload, CoordinatorState, KEY.public, COORDINATOR_DOMAIN)

    pacing = Pacing(at_once=1, at_first_per_s=2.0, least_per_s=1.0)
    fleet = run(tmp_path, make(pacing=pacing), scenario)
    assert states(fleet.connection)[0].spread_s == 3.0
    assert (fleet.outcome.online, fleet.outcome.spread_s) == (False, 3.0)


def test_when_more_is_sustained_than_was_taken_for_granted_everybody_is_told(tmp_path):
    async def scenario(fleet, _running):
        connection, counter = fleet.connection, 0
        while states(connection)[-1].spread_s > 1.0:
            counter += 1
            fleet.send(*(update(counter, device) for device in DEVICES))
            await connection.until(lambda counter=counter: len(fleet.received(DEVICES[-1])) >= counter)

    pacing = Pacing(at_once=1, at_first_per_s=2.0, least_per_s=1.0)
    fleet = run(tmp_path, make(pacing=pacing, goal=10_000), scenario)
    told = [state.spread_s for state in states(fleet.connection) if state.online]
    assert told[0] == 3.0
    assert len(told) < 5


def test_receipts_ask_devices_that_are_there_to_rest(tmp_path):
    """Three beyond the one that may come at once, at half of 0.5 a second: 12 s, times 0.5 to 1.5."""
    shown = frame.to_frame(Presence(online=True, boot="a"))

    async def scenario(fleet, _running):
        for device in DEVICES:
            fleet.connection.deliver(f"fl/1/pumps/st/{device}", shown)
        async with asyncio.timeout(10):
            while not fleet.service.committer.pacer.rest_s(bytes(32)):  # noqa: ASYNC110 - looks every 2 s
                await asyncio.sleep(0.02)
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))

    pacing = Pacing(at_once=1, at_first_per_s=0.5, most_per_s=0.5, least_per_s=0.1)
    fleet = run(tmp_path, make(pacing=pacing, goal=10), scenario)
    assert 6.0 <= fleet.received(ONE)[0].retry_after_s <= 18.0


# What others say of an update.


@pytest.fixture
def bench(tmp_path):
    opened = Bench(tmp_path)
    yield opened
    opened.close()


def real_and_forged(**changes):
    """A device's update, and a chunk with its digest and counter that somebody else made up."""
    envelope = make_update()
    claims = {"counter": 1, "digest": update_digest(envelope), "size_bytes": len(envelope), "content": b"x"}
    return envelope, frame.to_frame(UpdateChunk(**{**claims, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"size_bytes": 2**40},
        {"size_bytes": 2**40, "count": 2},
        {"index": 7, "count": 2, "size_bytes": 4000},
        {"index": -1},
        {"count": 5, "size_bytes": 1},
    ],
    ids=["an absurd size", "an absurd size in two", "no such chunk", "before the first", "too many chunks"],
)
def test_a_forged_chunk_with_the_digest_of_an_update_earns_no_receipt_that_would_end_it(bench, changes):
    envelope, forged = real_and_forged(**changes)
    refused = bench.receive(ONE, forged)
    assert isinstance(refused, Refused)
    (receipt,) = bench.judge(refused)
    assert receipt.digest == update_digest(forged) != update_digest(envelope)
    (genuine,) = bench.send(envelope)
    assert genuine.verdict is Verdict.APPLIED


def test_a_forged_chunk_between_the_real_ones_earns_no_receipt_at_all(bench):
    """Whose chunk was too long nobody can tell: the last to come may be the device's own."""
    envelope = make_update(metrics={"m" * 4000: 0.0})
    chunks = update_chunks(envelope, 1, 1024)
    forged = frame.to_frame(
        UpdateChunk(
            counter=1,
            digest=update_digest(envelope),
            size_bytes=len(envelope),
            index=1,
            count=len(chunks),
            content=bytes(len(envelope)),
        )
    )
    assert bench.receive(ONE, chunks[0]) is None
    refused = bench.receive(ONE, forged)
    assert bench.judge(refused) == [None]
    # And where the forged one came first.
    assert bench.receive(ONE, forged) is None
    refused = bench.receive(ONE, chunks[0])
    assert (refused.digest, bench.judge(refused)) == (None, [None])
    assert bench.intake.assembler.held_bytes == 0


def test_an_update_that_comes_again_after_a_hundred_later_ones_is_refused_and_changes_nothing(bench):
    """More than 63 counters back nobody knows whether it was applied: it is not applied again."""
    first = make_update(counter=1)
    bench.send(first)
    for counter in range(2, 102):
        bench.send(make_update(counter=counter, base_sha256=fingerprint(PLAN.initial)))
    before, entries = bench.state, list(bench.journal.entries_after(0))
    mark = bench.journal.marks()[ONE]
    (receipt,) = bench.send(first)
    assert (receipt.verdict, receipt.reason) == (Verdict.REJECTED, Reason.REPLAYED_COUNTER)
    assert receipt.digest == update_digest(first)
    assert receipt.highest == 101
    assert bench.state is before
    assert list(bench.journal.entries_after(0)) == entries
    assert bench.journal.marks()[ONE] == mark
    assert bench.accounting.balanced()
