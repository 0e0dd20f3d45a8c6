"""From the publisher to a device: every recent version leads to the newest, to the bit and in few bytes.

The broker is what a recording connection retains.
"""

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from recording_connection import RecordingConnection, retained
from small_fleet import FLEET, PLAN, device_key, make_settings
from test_coordinator_service import run, update

from coordinator.aggregation import FedBuff
from coordinator.closed_loop import ClosedLoop
from coordinator.model_blobs import BlobMaker
from coordinator.model_grid import first_on_grid
from coordinator.model_state import initial_state
from coordinator.publisher import Identity, Publisher
from coordinator.recovery import recover
from coordinator.replay import replay
from coordinator.settings import Evaluation, Publish, ReleaseGate, Stop
from coordinator.shelf import Shelf
from edge_agent.fetch import Fetcher, FetchFailed
from edge_agent.model_source import HeldModel, ModelSource
from fedtide.wire.chunks import join_blob
from fedtide.wire.ids import BlobId
from fedtide.wire.link import LinkDown, PublishRefused
from fedtide.wire.messages import Head
from fedtide.wire.model_blob import ModelFormat, keyframe_parameters
from fedtide.wire.parameters import Schema, TensorSpec, fingerprint
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import HEAD_DOMAIN

KEY = device_key("coordinator")
HEAD = "fl/1/pumps/model/head"
SCHEMA = Schema(
    tensors=(
        TensorSpec(name="p.w", dtype="float32", shape=(160, 50)),
        TensorSpec(name="p.b", dtype="float32", shape=(50,)),
    )
)
CHUNK_BYTES = 1024


def training(count, seed=1):
    """Models as training makes them: a few directions that last, noise, and steps that become smaller."""
    rng = np.random.default_rng(seed)
    model = rng.standard_normal(SCHEMA.size) * 0.15
    model[-50:] = 0.0  # biases start at zero
    drift = rng.standard_t(3, SCHEMA.size) * 0.001
    for number in range(count):
        yield model.astype(np.float32)
        model = model + (drift + rng.standard_t(3, SCHEMA.size) * 0.001) / (1 + number / 100)


@dataclass
class Retained(Fetcher):
    """Fetches from what a connection retains."""

    fleet: str = FLEET
    max_bytes: int = 1 << 20
    held: dict = field(default_factory=dict)
    fetched: dict[BlobId, int] = field(default_factory=dict)

    async def fetch(self, connection, ref):
        del connection
        topic = f"fl/1/pumps/model/b/{ref.id}"
        self.fetched[ref.id] = ref.size_bytes
        try:
            return join_blob(ref, {index: self.held[f"{topic}/{index}"] for index in range(ref.chunks)})
        except KeyError:
            raise FetchFailed("gone") from None


class Fleet:
    """A publisher and what it publishes, one connection after the other."""

    def __init__(self, shelf_file=None, **publish):
        settings = make_settings(chunk_bytes=CHUNK_BYTES, publish=Publish(**publish))
        self.loop = ClosedLoop(settings.publish, SCHEMA, None)
        self.versions = []
        self.connections = [RecordingConnection()]
        self.publisher = Publisher(
            settings,
            Identity(5, "run", PLAN.plan.id, b"the plan", KEY),
            self.remember,
            lambda: 1000.0,
            maker=BlobMaker(settings.publish, SCHEMA, self.earlier),
            shelf=Shelf(FLEET, shelf_file),
        )

    @property
    def connection(self):
        return self.connections[-1]

    async def remember(self, version):
        if version not in self.versions:
            self.versions.append(version)

    def earlier(self, sequence):
        if 0 <= sequence < len(self.versions):
            return self.versions[sequence].number, self.versions[sequence].parameters
        return None

    async def publish(self, models, first=0):
        """Every third version is published."""
        for place, model in enumerate(models, first):
            await self.publisher.publish(self.connection, self.loop.version(3 * place, model))

    def heads(self):
        return [
            unseal(sealed, Head, KEY.public, HEAD_DOMAIN)
            for connection in self.connections
            for sealed in connection.payloads(HEAD)
        ]

    def on_the_broker(self):
        return retained([each for connection in self.connections for each in connection.published])

    def blobs_on_the_broker(self):
        return {topic.split("/")[5] for topic in self.on_the_broker() if "/b/" in topic}

    async def take(self, version, held=None):
        """Bring a device from one version to another; what it fetches, and of how many bytes."""
        fetcher = Retained(held=self.on_the_broker())
        head = next(head for head in self.heads() if head.version == version.number)
        start = held and HeldModel(held.number, held.parameters)

        async def connected():
            return self.connection

        parameters = await ModelSource(connected, fetcher).parameters(head, SCHEMA, start)
        assert fingerprint(parameters) == head.parameters_sha256 == version.fingerprint
        return fetcher.fetched, head


async def costs_of_gaps(versions, gaps):
    """What a device fetches that missed so many versions, in keyframes; and the newest head."""
    fleet = Fleet()
    await fleet.publish(training(versions))
    costs = {}
    for gap in gaps:
        fetched, head = await fleet.take(fleet.versions[-1], fleet.versions[-1 - gap])
        costs[gap] = sum(fetched.values()) / head.full_blob.size_bytes
        assert len(fetched) <= 3 + 3 or head.full_blob.id in fetched  # indexes and deltas
    return costs, head


def test_any_gap_ends_in_the_same_bits_for_at_most_the_keyframe_and_a_fifth():
    costs, head = asyncio.run(costs_of_gaps(39, range(1, 39)))
    assert max(costs.values()) <= 1.2
    assert costs[1] < 0.1
    assert max(costs[gap] for gap in range(1, 9)) < 0.7
    assert head.full_blob.size_bytes < 4 * SCHEMA.size / 3
    assert len(head.deltas) == 1


@pytest.mark.long
@pytest.mark.parametrize("versions", [129, 150])
def test_any_gap_up_to_128_ends_in_the_same_bits_for_at_most_the_keyframe_and_a_fifth(versions):
    costs, _ = asyncio.run(costs_of_gaps(versions, range(1, 129)))
    assert max(costs.values()) <= 1.2
    assert max(costs[gap] for gap in range(1, 9)) < 0.7


def test_a_device_that_follows_every_version_takes_small_deltas_only():
    async def scenario():
        fleet, total = Fleet(), 0
        await fleet.publish(training(40))
        for before, after in zip(fleet.versions[20:], fleet.versions[21:], strict=False):
            if after.number >= fleet.versions[-2].number:
                fetched, head = await fleet.take(after, before)
                assert list(fetched) == [head.deltas[0].blob.id]
                total = max(total, sum(fetched.values()))
        return total

    assert asyncio.run(scenario()) < 4 * SCHEMA.size / 20


def test_a_device_without_a_model_takes_the_keyframe():
    async def scenario():
        fleet = Fleet()
        await fleet.publish(training(3))
        fetched, head = await fleet.take(fleet.versions[-1])
        assert list(fetched) == [head.full_blob.id]

    asyncio.run(scenario())


def test_what_the_last_three_heads_name_stays_and_the_rest_goes():
    async def scenario():
        fleet = Fleet()
        await fleet.publish(training(40))
        assert all([await fleet.take(version, fleet.versions[10]) for version in fleet.versions[-3:]])
        with pytest.raises(FetchFailed):
            await fleet.take(fleet.versions[-4], None)
        heads = fleet.heads()[-3:]
        direct = {head.full_blob.id for head in heads} | {heads[0].plan_blob.id}
        indexes = {head.delta_index.id for head in heads}
        return direct | indexes, fleet.blobs_on_the_broker()

    named, there = asyncio.run(scenario())
    assert named <= there
    # And deltas: 8 into each of them, and into the ends 8, 16, 24 and 32 (0, 1, 2 and 3 from earlier ends
    # besides), with their four indexes.
    assert len(there) == len(named) + 3 * 8 + (4 * 8 + 0 + 1 + 2 + 3) + 4


def test_a_broker_that_forgot_gets_direct_deltas():
    async def scenario():
        fleet = Fleet()
        await fleet.publish(training(40))
        fleet.connections = [RecordingConnection()]  # of the ones before, nothing is retained
        await fleet.publisher.renew(fleet.connection, everything=True)
        newest, costs = fleet.versions[-1], {}
        for gap in (*range(1, 9), 15, 23, 39):
            fetched, head = await fleet.take(newest, fleet.versions[-1 - gap])
            costs[gap] = head.full_blob.id in fetched
        await fleet.publish(list(training(48))[40:], 40)
        for gap in (1, 5, 8):
            fetched, head = await fleet.take(fleet.versions[-1], fleet.versions[-1 - gap])
            costs[-gap] = head.full_blob.id in fetched
        return costs

    assert not any(asyncio.run(scenario()).values())


def test_a_connection_that_is_lost_while_deltas_are_sent_costs_nothing_but_time():
    async def scenario():
        fleet = Fleet()
        models = list(training(21))
        await fleet.publish(models[:20])
        left = iter(range(3))

        def lose(_publication):
            if next(left, None) is None:
                raise LinkDown("lost")

        fleet.connection.on_publish = lose
        with pytest.raises(LinkDown):
            await fleet.publish(models[20:], 20)
        fleet.connections.append(RecordingConnection())
        await fleet.publisher.renew(fleet.connection, everything=True)
        fetched, head = await fleet.take(fleet.versions[-1], fleet.versions[-2])
        return list(fetched) == [head.deltas[0].blob.id]

    assert asyncio.run(scenario())


def test_what_was_encoded_for_a_broker_that_forgot_is_kept_for_the_next_connection():
    """Or a link that breaks more often than that takes would never bring a head."""

    async def scenario():
        fleet, looked_up = Fleet(), []
        await fleet.publish(training(4))
        fleet.publisher._maker._earlier = lambda sequence: (
            looked_up.append(sequence) or fleet.earlier(sequence)
        )
        for number in range(3):
            fleet.connections.append(RecordingConnection())
            if number < 2:
                fleet.connection.lose()
                with pytest.raises(LinkDown):
                    await fleet.publisher.renew(fleet.connection, everything=True)
            else:
                await fleet.publisher.renew(fleet.connection, everything=True)
        await fleet.take(fleet.versions[-1], fleet.versions[0])
        return looked_up

    assert asyncio.run(scenario()) == [2, 1, 0]


def test_the_next_run_clears_what_this_one_left(tmp_path):
    async def scenario():
        before = Fleet(tmp_path / "shelf")
        await before.publish(training(20))
        after = Fleet(tmp_path / "shelf")
        after.connections = before.connections
        models = list(training(24, seed=2))
        await after.publish(models[:2])
        assert before.heads()[-1].full_blob.id in after.blobs_on_the_broker()  # somebody may be fetching it
        await after.publish(models[2:4], 2)
        named = {head.full_blob.id for head in after.heads()[-3:]}
        return after.blobs_on_the_broker(), named

    there, named = asyncio.run(scenario())
    assert named <= there
    assert len(there) == 1 + 3 + (1 + 2 + 3) + 2  # the plan, keyframes, deltas, the indexes of two versions


def test_a_damaged_memory_of_the_shelf_stops_nothing(tmp_path, caplog):
    (tmp_path / "shelf").write_bytes(b"\1nonsense")

    async def scenario():
        fleet = Fleet(tmp_path / "shelf")
        await fleet.publish(training(2))
        return await fleet.take(fleet.versions[-1], fleet.versions[0])

    asyncio.run(scenario())
    assert "blobs of earlier runs stay on the broker" in caplog.text


@pytest.mark.parametrize("publish", [{"format": ModelFormat.FLOAT32}, {"deltas": False}])
def test_deltas_can_be_left_out(publish):
    async def scenario():
        fleet = Fleet(**publish)
        await fleet.publish(training(4))
        fetched, head = await fleet.take(fleet.versions[-1], fleet.versions[-2])
        assert list(fetched) == [head.full_blob.id]
        assert (head.deltas, head.delta_index, fleet.publisher.delta_bytes) == ((), None, None)
        assert len(fleet.blobs_on_the_broker()) == 1 + 3
        return head.full_blob.size_bytes

    size_bytes = asyncio.run(scenario())
    assert (size_bytes > 4 * SCHEMA.size) == ("format" in publish)


def test_a_model_that_jumps_is_published_whole_and_found_by_everyone():
    """Beyond what integers of the old grid can hold there is no delta."""

    async def scenario():
        fleet = Fleet()
        models = [*training(3), *(model * np.float32(2.0**30) for model in training(3))]
        await fleet.publish(models)
        jump, after = fleet.versions[3], fleet.versions[-1]
        assert jump.parameters.tolist() == first_on_grid(models[3], SCHEMA).tolist()
        head = next(head for head in fleet.heads() if head.version == jump.number)
        assert (head.deltas, head.delta_index) == ((), None)
        fetched, head = await fleet.take(after, fleet.versions[0])
        assert head.full_blob.id in fetched
        fetched, head = await fleet.take(after, fleet.versions[-2])
        assert head.full_blob.id not in fetched

    asyncio.run(scenario())


def test_a_head_with_deltas_stays_small():
    async def scenario():
        fleet = Fleet()
        await fleet.publish(training(30))
        return fleet.connection.payloads(HEAD)

    assert max(map(len, asyncio.run(scenario()))) < 600


ON_THE_GRID = Publish(min_interval_s=0.0)


@dataclass(frozen=True)
class Outcome:
    loss: float
    metric: float | None


async def send_each(fleet, counters):
    """Updates on version 0, one version each; every one of them is offered."""
    zero = fleet.heads()[0].parameters_sha256
    for counter in counters:
        fleet.send(update(counter, base_sha256=zero, delta=np.arange(8, dtype=np.float32) * 0.01))
        await fleet.connection.until(lambda counter=counter: fleet.heads()[-1].version >= counter)


def test_what_is_evaluated_and_released_is_what_devices_hold(tmp_path):
    evaluated = set()

    def evaluate(parameters):
        evaluated.add(fingerprint(parameters))
        return Outcome(loss=0.5, metric=None)

    async def main(fleet, _running):
        await send_each(fleet, range(1, 6))
        await fleet.connection.until(
            lambda: fleet.heads()[-1].release and fleet.heads()[-1].release.version == 5
        )
        return fleet.service.status("running")

    fleet = run(
        tmp_path,
        make_settings(
            aggregator=FedBuff(goal=1),
            publish=ON_THE_GRID,
            evaluation=Evaluation(data=tmp_path),
            release=ReleaseGate(loss_at_most=1.0),
        ),
        main,
        evaluate=evaluate,
    )
    held = {head.version: head.parameters_sha256 for head in fleet.heads()}
    aggregated = fleet.service.committer.committed
    assert aggregated.version == 5
    assert held[5] != fingerprint(aggregated.parameters)  # or this test would say nothing
    assert held[5] in evaluated <= set(held.values())
    release = fleet.heads()[-1].release
    assert release.parameters_sha256 == held[5]
    topic = f"fl/1/pumps/model/b/{release.blob.id}"
    chunks = retained(fleet.connection.published)
    content = join_blob(
        release.blob, {index: chunks[f"{topic}/{index}"] for index in range(release.blob.chunks)}
    )
    assert fingerprint(keyframe_parameters(content, 5, PLAN.plan.manifest.schema)) == held[5]
    assert fleet.outcome.keyframe_bytes == fleet.heads()[-1].full_blob.size_bytes


def test_a_restarted_coordinator_offers_the_same_version_to_the_bit_and_goes_on_from_it(tmp_path):
    settings = make_settings(aggregator=FedBuff(goal=1), publish=ON_THE_GRID)

    async def three(fleet, _running):
        await send_each(fleet, (1, 2, 3))

    async def nothing(_fleet, _running):
        pass

    before = run(tmp_path, settings, three).heads()
    after = run(tmp_path, settings, nothing).heads()
    assert (before[-1].version, after[0].version) == (3, 3)
    assert after[0].parameters_sha256 == before[-1].parameters_sha256
    # The update that was trained on it is still known by it.
    published = run(tmp_path, settings, nothing).service._writer.published
    assert published[3] == before[-1].parameters_sha256


async def becomes(condition):
    while not condition():  # noqa: ASYNC110 - what is waited for announces nothing
        await asyncio.sleep(0.005)


def test_the_last_version_does_not_get_into_the_record_of_the_one_before(tmp_path):
    """The run stops while the version before the last waits to be offered."""
    settings = make_settings(aggregator=FedBuff(goal=1), publish=ON_THE_GRID, stop=Stop(versions=2))

    async def main(fleet, running):
        service, zero = fleet.service, fleet.heads()[0].parameters_sha256
        delta = np.arange(8, dtype=np.float32) * 0.01
        gate = fleet.connection.hold(HEAD)
        renewal = asyncio.create_task(service._publisher.renew(fleet.connection, everything=False))
        fleet.send(update(1, base_sha256=zero, delta=delta))
        await becomes(lambda: service._versions.newest.number == 1)
        fleet.send(update(2, base_sha256=zero, delta=delta))
        await becomes(lambda: service._writer.stopped)
        await asyncio.wait([running], timeout=0.05)  # now it would make version 2
        gate.set()
        await renewal
        await running

    fleet = run(tmp_path, settings, main)
    assert [head.version for head in fleet.heads()][-1] == 2
    opened = recover(tmp_path / "state", settings, PLAN)
    made = {0: None}  # whole numbers: on the grid as they are
    replay(
        opened.journal,
        initial_state(PLAN.initial, opened.state.rules),
        0,
        schema=PLAN.plan.manifest.schema,
        bases=opened.models.base,
        on_version=lambda state: made.setdefault(state.version, fingerprint(state.parameters)),
    )
    assert {row.version: row.exact for row in opened.journal.published()} == made
    opened.close()


def test_a_version_that_the_broker_refused_is_offered_again(tmp_path):
    """No other version comes of itself: the devices may all be waiting for this one."""
    refused = []

    def refuse(publication):
        if "/b/" in publication.topic and publication.payload and not refused:
            refused.append(publication)
            raise PublishRefused("quota exceeded")

    async def main(fleet, _running):
        fleet.connection.on_publish = refuse
        await send_each(fleet, [1])
        return refused

    fleet = run(tmp_path, make_settings(aggregator=FedBuff(goal=1), publish=ON_THE_GRID), main)
    assert len(fleet.outcome) == 1
