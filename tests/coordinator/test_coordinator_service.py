"""The running coordinator over a recorded connection: durable first, then acknowledged; stops; comes back."""

import asyncio
import threading
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from recording_connection import RecordingConnection
from simulated_disk import SimulatedDisk, full
from small_fleet import DEVICES, PLAN, constant, device_key, make_settings, make_update

from coordinator import status
from coordinator.aggregation import FedAsync, FedBuff
from coordinator.entries import UpdateEntry
from coordinator.journal import History, StorageFailed
from coordinator.recovery import recover
from coordinator.service import CoordinatorService
from coordinator.settings import Evaluation, Journal, Publish, ReleaseGate, Stop, Update
from coordinator.staleness import Constant
from fedtide.wire import frame
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.clock import SYSTEM_CLOCK
from fedtide.wire.disk import OS_DISK
from fedtide.wire.envelope import update_digest
from fedtide.wire.link import Broker, LinkDown
from fedtide.wire.messages import (
    CoordinatorState,
    DownMessage,
    Head,
    MissingChunks,
    Presence,
    Reason,
    Receipt,
    Resync,
    TrainingEvent,
    Verdict,
)
from fedtide.wire.parameters import fingerprint
from fedtide.wire.seal import unseal, unseal_any
from fedtide.wire.signatures import COORDINATOR_DOMAIN, DOWN_DOMAIN, HEAD_DOMAIN

KEY = device_key("coordinator")
ONE, TWO = DEVICES[:2]
HEAD, COORDINATOR = "fl/1/pumps/model/head", "fl/1/pumps/coord"
FAST = {"broker": Broker(reconnect_min_s=0.001, reconnect_max_s=0.01)}
AT_ONCE = Publish(min_interval_s=0.0, format="float32")  # to the bit: tests count by the parameters


def down(device):
    return f"fl/1/pumps/dn/{device}"


@dataclass(frozen=True)
class Outcome:
    loss: float
    metric: float | None


class Fleet:
    """A coordinator and the connections it is given, one after the other."""

    def __init__(
        self, directory, settings, *, connections=1, evaluate=None, disk=OS_DISK, clock=SYSTEM_CLOCK
    ):
        self.directory, self.settings = directory, settings
        self.connections = [RecordingConnection() for _ in range(connections)]
        self.sessions = []
        self.look = RecordingConnection()  # the one on which it looks whether another coordinator is there
        for device in DEVICES:
            (directory / "roster").mkdir(exist_ok=True, parents=True)
            (directory / "roster" / f"{device}.pub").write_text(str(device_key(device).public))
        self.recovered = recover(directory / "state", settings, PLAN, disk)
        self.service = CoordinatorService(
            settings,
            plan=PLAN,
            key=KEY,
            directory=directory,
            recovered=self.recovered,
            dial=self.dial,
            evaluate=evaluate,
            clock=clock,
        )

    async def dial(self, session, _attempt):
        if "-look-" in session.client_id:
            return self.look
        self.sessions.append(session)
        if len(self.sessions) > len(self.connections):
            raise LinkDown("there are no more connections")
        return self.connections[len(self.sessions) - 1]

    @property
    def connection(self):
        return self.connections[max(0, len(self.sessions) - 1)]

    def send(self, *envelopes, chunk_bytes=MAX_CHUNK_BYTES, only=None):
        """Deliver updates of device one, or as their topic says."""
        for device, counter, envelope in envelopes:
            for index, chunk in enumerate(update_chunks(envelope, counter, chunk_bytes)):
                if only is None or index in only:
                    self.connection.deliver(f"fl/1/pumps/up/0/{device}", chunk)

    def received(self, device):
        """What a device was told."""
        return [
            unseal_any(sealed, DownMessage, KEY.public, DOWN_DOMAIN)
            for sealed in self.connection.payloads(down(device))
        ]

    def heads(self):
        return [
            unseal(sealed, Head, KEY.public, HEAD_DOMAIN)
            for connection in self.connections
            for sealed in connection.payloads(HEAD)
        ]

    def in_the_journal(self):
        """Counters of the updates that another process would find in the journal."""
        entries = History(self.directory / "state" / "journal", self.recovered.disk).entries_after(0)
        return [entry.counter for _, entry in entries if isinstance(entry, UpdateEntry)]


def update(counter=1, device=ONE, **changes):
    return device, counter, make_update(device=device, counter=counter, **changes)


def run(tmp_path, settings, scenario, **parts):
    """Run the coordinator while the scenario lasts, then shut it down; the scenario's fleet."""

    async def main():
        fleet = Fleet(tmp_path, msgspec.structs.replace(settings, **FAST), **parts)
        running = asyncio.create_task(fleet.service.run())
        try:
            await fleet.connection.until(lambda: HEAD in fleet.connection.topics())
            async with asyncio.timeout(20.0):
                fleet.outcome = await scenario(fleet, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            fleet.recovered.close()
        return fleet

    return asyncio.run(main())


def make(stop=None, goal=1, **changes):
    return make_settings(aggregator=FedBuff(goal=goal), publish=AT_ONCE, stop=stop or Stop(), **changes)


def test_an_update_is_acknowledged_and_receipted_only_once_it_is_in_the_journal(tmp_path):
    async def scenario(fleet, _running):
        found = []
        connection = fleet.connection
        connection.on_publish = lambda message: (
            found.append((list(connection.acknowledged), fleet.in_the_journal()))
            if message.topic == down(ONE)
            else None
        )
        acknowledged_with, acknowledge = [], connection.acknowledge

        def look_and_acknowledge(delivery):
            acknowledged_with.append(fleet.in_the_journal())
            acknowledge(delivery)

        connection.acknowledge = look_and_acknowledge
        gate = connection.hold(down(ONE))
        fleet.send(update(5))
        await connection.until(lambda: connection.acknowledged)
        assert acknowledged_with == [[5]]
        gate.set()
        await connection.until(lambda: fleet.received(ONE))
        assert [journal for _, journal in found] == [[5]]

    fleet = run(tmp_path, make(goal=10), scenario)
    (receipt,) = fleet.received(ONE)
    assert (receipt.verdict, receipt.counter) == (Verdict.APPLIED, 5)


def test_when_the_disk_is_full_the_coordinator_ends_and_acknowledges_nothing(tmp_path):
    async def scenario(fleet, running):
        disk.fail(full)
        fleet.send(*(update(1, device) for device in DEVICES))
        with pytest.raises(StorageFailed, match=r"appending \d+ bytes failed: No space left on device"):
            await running

    disk = SimulatedDisk()
    fleet = run(tmp_path, make(), scenario, disk=disk)
    assert fleet.connection.acknowledged == []
    assert fleet.received(ONE) == []
    assert [head.version for head in fleet.heads()] == [0]
    disk.fail(None)
    again = recover(tmp_path / "state", make(), PLAN, disk)
    assert again.state.version == 0
    assert [row.version for row in again.journal.published()] == [0]
    again.close()


def test_a_version_is_not_put_on_record_before_its_updates_are_committed(tmp_path):
    """The time to publish comes while a batch waits for a disk on which it will find no room."""

    async def scenario(fleet, running):
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))
        turn = threading.Event()
        waiting = asyncio.create_task(fleet.service._journal_thread.run(turn.wait))
        disk.fail(full)
        fleet.send(*(update(2, device) for device in DEVICES))
        await asyncio.wait([running], timeout=0.5)  # longer than the pause between two publications
        turn.set()
        with pytest.raises(StorageFailed, match="No space left on device"):
            await running
        await waiting

    disk = SimulatedDisk()
    settings = msgspec.structs.replace(make(), publish=Publish(min_interval_s=0.2))
    fleet = run(tmp_path, settings, scenario, disk=disk)
    assert max(head.version for head in fleet.heads()) <= 1
    disk.fail(None)
    again = recover(tmp_path / "state", settings, PLAN, disk)
    assert again.state.version == 1
    assert max(row.version for row in again.journal.published()) <= 1
    again.close()


def test_a_run_knows_what_the_run_before_it_applied(tmp_path):
    async def send(fleet, _running):
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))

    verdicts = [run(tmp_path, make(goal=10), send).received(ONE)[0].verdict for _ in range(2)]
    assert verdicts == [Verdict.APPLIED, Verdict.DUPLICATE]


def test_many_updates_that_arrive_together_are_all_judged(tmp_path):
    async def scenario(fleet, _running):
        for counter in (1, 2, 3):
            fleet.send(*(update(counter, device) for device in DEVICES))
            await fleet.connection.until(
                lambda counter=counter: all(len(fleet.received(device)) == counter for device in DEVICES)
            )
        assert fleet.service.status("running").updates.applied == 12

    fleet = run(tmp_path, make(goal=5), scenario)
    assert fleet.service.committer.accounting.balanced()
    assert sorted(fleet.in_the_journal()) == [1] * 4 + [2] * 4 + [3] * 4


def test_a_full_buffer_becomes_a_version_that_devices_are_offered(tmp_path):
    async def scenario(fleet, _running):
        fleet.send(update(1), update(1, TWO))
        await fleet.connection.until(lambda: len(fleet.heads()) == 2)

    first, second = run(tmp_path, make(goal=2), scenario).heads()
    assert (first.version, second.version) == (0, 1)
    assert second.parent_sha256 == first.parameters_sha256


def test_the_time_limit_closes_a_partly_full_buffer(tmp_path):
    async def scenario(fleet, _running):
        fleet.send(update(1, delta=constant(8.0)))
        await fleet.connection.until(lambda: len(fleet.heads()) == 2)
        return fleet.service.status("running")

    fleet = run(tmp_path, make(goal=10, flush_after_s=0.05), scenario)
    assert (fleet.outcome.version, fleet.outcome.buffered) == (1, 0)


def test_without_a_time_limit_a_partly_full_buffer_waits(tmp_path):
    async def scenario(_fleet, running):
        assert await running == "seconds reached 0.3"

    def started(fleet, running):
        fleet.send(update(1))
        return scenario(fleet, running)

    fleet = run(tmp_path, make(Stop(seconds=0.3), goal=10, flush_after_s=None), started)
    assert fleet.service.status("stopped").buffered == 1


def test_a_buffer_recovered_after_a_restart_is_closed_by_the_time_limit_too(tmp_path):
    settings = make(goal=10, flush_after_s=None)

    async def send_one(fleet, _running):
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(ONE))

    async def wait_for_the_flush(fleet, _running):
        await fleet.connection.until(lambda: fleet.heads()[-1].version == 1)

    run(tmp_path, settings, send_one)
    run(tmp_path, msgspec.structs.replace(settings, flush_after_s=0.05), wait_for_the_flush)


STOPS = [
    (Stop(versions=2), "versions reached 2"),
    (Stop(updates=3), "updates reached 3"),
    (Stop(metric=3.0), "metric reached 3"),
    (Stop(seconds=0.3), "seconds reached 0.3"),
]


@pytest.mark.parametrize(("stop", "reason"), STOPS, ids=[reason.split()[0] for _, reason in STOPS])
def test_the_coordinator_stops_by_itself_and_offers_the_last_version(tmp_path, stop, reason):
    def evaluate(parameters):
        # The first parameter starts at 0, and every applied update adds 1 to it.
        return Outcome(loss=0.0, metric=float(parameters[0]))

    async def scenario(fleet, running):
        fleet.send(*(update(1, device) for device in DEVICES[:3]))
        assert await running == reason

    settings = make(stop, evaluation=Evaluation(data=tmp_path), staleness=Constant())
    fleet = run(tmp_path, settings, scenario, evaluate=evaluate)
    last = fleet.heads()[-1]
    assert (last.version, last.training) == (3, False)
    seen = status.read(tmp_path / "status.json")
    assert (seen.state, seen.stop_reason, seen.version) == ("stopped", reason, 3)
    assert seen.updates.applied == 3
    states = [
        unseal(sealed, CoordinatorState, KEY.public, COORDINATOR_DOMAIN).online
        for sealed in fleet.connection.payloads(COORDINATOR)
    ]
    assert states == [True, False]
    assert fleet.connection.closed


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_version_that_would_not_be_finite_is_offered_with_the_parameters_before(tmp_path):
    """Two finite deltas whose sum is not; also where it is the last one, at the stop."""

    async def scenario(fleet, running):
        fleet.send(*(update(1, device, delta=constant(3e38)) for device in (ONE, TWO)))
        assert await running == "updates reached 2"

    fleet = run(tmp_path, make(Stop(updates=2), staleness=Constant()), scenario)
    assert fleet.service.status("stopped").version == 2
    last = fleet.heads()[-1]
    assert (last.version, last.training) == (2, False)
    assert last.parameters_sha256 == fingerprint(PLAN.initial + np.float32(3e38))


def test_a_version_that_passes_the_gate_is_released(tmp_path):
    def evaluate(parameters):
        return Outcome(loss=0.0, metric=float(parameters[0]))

    async def scenario(fleet, running):
        fleet.send(*(update(1, device) for device in DEVICES[:3]))
        assert await running == "metric reached 3"

    gate = {"evaluation": Evaluation(data=tmp_path), "release": ReleaseGate(metric_at_least=3.0)}
    settings = make(Stop(metric=3.0), staleness=Constant(), **gate)
    fleet = run(tmp_path, settings, scenario, evaluate=evaluate)
    assert fleet.heads()[-1].release.version == 3


def test_a_shutdown_commits_what_arrived_and_leaves_a_snapshot(tmp_path):
    async def scenario(fleet, running):
        fleet.send(update(1), update(1, TWO))
        await fleet.connection.until(lambda: fleet.service.committer.accounting.received == 2)
        running.cancel()
        assert await running is None

    fleet = run(tmp_path, make(goal=10), scenario)
    again = recover(tmp_path / "state", make(goal=10), PLAN)
    assert (again.replayed, again.state.buffer.count) == (0, 2)
    again.close()
    assert status.read(tmp_path / "status.json").state == "offline"
    assert fleet.connection.closed


def test_a_snapshot_is_due_after_so_many_bytes_too(tmp_path):
    async def scenario(fleet, _running):
        for counter in range(1, 11):
            fleet.send(update(counter, metrics={"m" * 7500: 0.0}))
            await fleet.connection.until(lambda counter=counter: len(fleet.received(ONE)) == counter)
        assert len(list(fleet.recovered.journal.snapshots())) == 1

    run(tmp_path, make(goal=100, journal=Journal(snapshot_every_bytes=65_536)), scenario)


def test_at_every_step_of_a_publication_each_version_on_record_has_its_file(tmp_path):
    """So a kill at any of them leaves no base that is admitted and cannot be read."""
    settings = msgspec.structs.replace(make(), publish=Publish(min_interval_s=0.0, keep_versions=2))
    missing, disk, state = [], SimulatedDisk(), tmp_path / "state"

    def look(_operation):
        files = {int(name.split(".")[0]) for name in disk.names(state / "models")}
        rows = {row.version for row in History(state / "journal", disk).published()}
        missing.append(rows - files)

    async def scenario(fleet, _running):
        disk.watch(look)
        for counter in range(1, 6):
            heads = len(fleet.heads())
            base = fleet.heads()[-1]
            fleet.send(update(counter, base_version=base.version, base_sha256=base.parameters_sha256))
            await fleet.connection.until(lambda heads=heads: len(fleet.heads()) > heads)
        disk.watch(None)

    fleet = run(tmp_path, settings, scenario, disk=disk)
    assert [head.version for head in fleet.heads()] == [0, 1, 2, 3, 4, 5]
    assert len(missing) > 20
    assert not any(missing)


def test_each_run_has_a_higher_epoch(tmp_path):
    async def scenario(_fleet, _running):
        pass

    epochs = [run(tmp_path, make(), scenario).heads()[-1].epoch for _ in range(3)]
    assert epochs == [1, 2, 3]


def test_chunks_that_did_not_come_are_asked_for(tmp_path):
    large = update(1, metrics={"m" * 4000: 0.0})

    async def scenario(fleet, _running):
        fleet.send(large, chunk_bytes=1024, only={0, 3})
        await fleet.connection.until(lambda: fleet.received(ONE))
        fleet.send(large, chunk_bytes=1024, only={1, 2, 4})
        await fleet.connection.until(lambda: isinstance(fleet.received(ONE)[-1], Receipt))

    settings = make(update=Update(missing_after_s=0.05))
    missing, *_, receipt = run(tmp_path, settings, scenario).received(ONE)
    assert isinstance(missing, MissingChunks)
    assert (missing.counter, missing.indexes) == (1, (1, 2))
    assert missing.digest == update_digest(large[2])
    assert receipt.verdict is Verdict.APPLIED


def test_a_device_that_does_not_answer_is_asked_ever_more_rarely_and_its_chunks_are_dropped(tmp_path):
    large = update(1, metrics={"m" * 4000: 0.0})

    async def scenario(fleet, _running):
        assembler = fleet.service._reception._intake.assembler
        fleet.send(large, chunk_bytes=1024, only={0, 3})
        await fleet.connection.until(lambda: len(fleet.received(ONE)) == 5)
        async with asyncio.timeout(5):
            while assembler.held_bytes:  # noqa: ASYNC110 - nobody announces what is forgotten
                await asyncio.sleep(0.01)

    settings = make(update=Update(missing_after_s=0.01))
    asked = [message.indexes for message in run(tmp_path, settings, scenario).received(ONE)]
    # The last chunk may still be on its way for a while.
    assert asked == [(1, 2)] * 3 + [(1, 2, 4)] * 2


@pytest.mark.parametrize("session_present", [False, True])
def test_after_a_lost_connection_the_next_one_gets_everything(tmp_path, session_present):
    """Even where the broker knows the session: that may be from before a crash, and the chunks from after."""

    async def scenario(fleet, _running):
        first, second = fleet.connections
        second.session_present = session_present
        fleet.send(update(1))
        await first.until(lambda: len(fleet.heads()) == 2)
        first.lose()
        await second.until(lambda: HEAD in second.topics())
        fleet.send(update(2))
        await second.until(lambda: fleet.received(ONE))

    fleet = run(tmp_path, make(), scenario, connections=2)
    first, second = fleet.connections
    chunks = {topic for topic in first.topics() if "/b/" in topic}
    newest = fleet.heads()[1]
    assert f"fl/1/pumps/model/b/{newest.full_blob.id}/0" in second.topics()
    assert f"fl/1/pumps/model/b/{newest.plan_blob.id}/0" in chunks & set(second.topics())
    assert second.topics().index(HEAD) > max(
        second.topics().index(topic) for topic in second.topics() if topic in chunks
    )
    assert [session.clean_start for session in fleet.sessions[:2]] == [False, False]


def test_devices_are_asked_to_send_again_when_the_broker_forgot_them(tmp_path):
    async def scenario(fleet, _running):
        first, second = fleet.connections
        first.deliver(f"fl/1/pumps/st/{TWO}", frame.to_frame(Presence(online=True, boot="b")))
        first.deliver(f"fl/1/pumps/st/{ONE}", frame.to_frame(Presence(online=False, boot="a")))
        await first.until(lambda: len(first.acknowledged) == 2)
        first.lose()
        await second.until(lambda: down(TWO) in second.topics())

    fleet = run(tmp_path, make(), scenario, connections=2)
    assert fleet.received(TWO) == [Resync(device=TWO)]
    assert fleet.received(ONE) == []


def test_presence_and_training_events_show_in_the_status_and_decide_nothing(tmp_path):
    event = TrainingEvent(version=0, num_examples=5, steps=1, seconds=0.1, loss=1.25)

    async def scenario(fleet, _running):
        connection = fleet.connection
        connection.deliver(
            f"fl/1/pumps/st/{ONE}", frame.to_frame(Presence(online=True, boot="a", model_version=0))
        )
        connection.deliver(f"fl/1/pumps/ev/{ONE}", frame.to_frame(event), qos=0)
        connection.deliver(f"fl/1/pumps/st/{TWO}", b"\x01 not a presence")
        connection.deliver("fl/1/pumps/nonsense", b"")
        await connection.until(lambda: len(connection.acknowledged) == 4)
        return fleet.service.status("running")

    seen = run(tmp_path, make(), scenario).outcome
    one, two = seen.devices[:2]
    assert (one.device, one.online, one.model_version, one.loss) == (ONE, True, 0, 1.25)
    assert not two.online
    assert seen.updates.received == 0


def test_a_stranger_is_kept_for_the_operator_and_refused_until_enrolled(tmp_path):
    key = device_key("stranger")
    shown = frame.to_frame(Presence(online=True, boot="a", public_key=key.public.raw))

    async def scenario(fleet, _running):
        fleet.connection.deliver("fl/1/pumps/st/stranger", shown)
        fleet.send(update(1, "stranger"))
        await fleet.connection.until(lambda: fleet.received("stranger"))

    fleet = run(tmp_path, make(), scenario)
    (receipt,) = fleet.received("stranger")
    assert receipt.reason is Reason.UNKNOWN_DEVICE
    assert (tmp_path / "pending" / "stranger.pub").read_text().strip() == str(key.public)
    assert not (tmp_path / "roster" / "stranger.pub").exists()


def test_open_enrolment_accepts_the_first_key_and_no_other(tmp_path):
    first, second = device_key("stranger"), device_key("impostor")

    async def scenario(fleet, _running):
        for key in (first, second):
            shown = Presence(online=True, boot="a", public_key=key.public.raw)
            fleet.connection.deliver("fl/1/pumps/st/stranger", frame.to_frame(shown))
        fleet.send(update(1, "stranger"))
        await fleet.connection.until(lambda: fleet.received("stranger"))

    fleet = run(tmp_path, make(open_enrolment=True), scenario)
    assert fleet.received("stranger")[0].verdict is Verdict.APPLIED
    assert (tmp_path / "roster" / "stranger.pub").read_text().strip() == str(first.public)


def test_updates_at_most_once_are_bounded_too(tmp_path):
    """At QoS 0 the broker has no receive maximum: a flood must not fill the coordinator's memory."""

    async def scenario(fleet, _running):
        (chunk,) = update_chunks(make_update(plan="0" * 32), 1, MAX_CHUNK_BYTES)
        for _ in range(1500):
            fleet.connection.deliver(f"fl/1/pumps/up/0/{ONE}", chunk, qos=0)
        most = 0
        while fleet.connection._inbox.qsize() or fleet.service.committer.accounting.waiting:
            most = max(most, len(fleet.service.committer._line._waiting))
            await asyncio.sleep(0)
        return most

    fleet = run(tmp_path, make(), scenario)
    assert fleet.service.committer.accounting.balanced()
    assert fleet.outcome <= fleet.settings.journal.max_batch


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 0x40])  # the exponent of the last parameter


@pytest.mark.parametrize(
    "damaged", [flipped, lambda content: content[:-5], lambda _content: b""], ids=["a bit", "cut", "empty"]
)
def test_a_model_file_that_is_damaged_is_made_again_and_never_offered(tmp_path, damaged):
    async def scenario(fleet, _running):
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.heads()[-1].version == 1)

    async def nothing(_fleet, _running):
        pass

    offered = run(tmp_path, make(), scenario).heads()[-1]
    file = tmp_path / "state" / "models" / "000000000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(damaged(whole))
    again = run(tmp_path, make(), nothing).heads()[-1]
    assert (again.version, again.parameters_sha256) == (1, offered.parameters_sha256)
    assert file.read_bytes()[-32:] == whole[-32:]


def test_with_an_aggregator_that_needs_bases_the_models_on_disk_are_bounded_too(tmp_path):
    """A version stays while a replay may need it: snapshots come often enough that this is not for long."""

    async def scenario(fleet, _running):
        for counter in range(1, 21):
            newest = fleet.heads()[-1]
            base = {"base_version": newest.version, "base_sha256": newest.parameters_sha256}
            fleet.send(update(counter, **base))
            await fleet.connection.until(lambda counter=counter: fleet.heads()[-1].version == counter)

    settings = msgspec.structs.replace(
        make(),
        aggregator=FedAsync(mixing=0.5),
        publish=Publish(min_interval_s=0.0, format="float32", keep_versions=2),
    )
    run(tmp_path, settings, scenario)
    assert len(list((tmp_path / "state" / "models").iterdir())) <= 2 + 2 * 3
