"""An agent that holds a version brings it to the next over a delta; its files then hold the whole model."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from agent_world import COORDINATOR_KEY, FLEET, Published, Release, World, run, tiny_plan, until

from edge_agent.model_slots import ModelSlots
from fedtide.wire import frame, topics
from fedtide.wire.chunks import blob_ref
from fedtide.wire.codecs.grid import encode_grid
from fedtide.wire.ids import ModelVersion
from fedtide.wire.messages import BlobRef, ModelDelta
from fedtide.wire.model_blob import ModelBlob, ModelFormat, max_keyframe_bytes
from fedtide.wire.parameters import fingerprint
from fedtide.wire.seal import seal
from fedtide.wire.signatures import HEAD_DOMAIN

OUT_OF_REACH = BlobRef(max_keyframe_bytes(tiny_plan().manifest.schema), bytes(32), 4096)
"""A keyframe that nobody has."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.new(tmp_path)


def publish_only_the_delta(world: World, start: int, end: Release, lead: int) -> None:
    """The head of a version whose delta adds ``lead`` to every parameter, and whose keyframe is not there."""
    payload = encode_grid(np.full(3, lead, np.int32), (0, 0), tiny_plan().manifest.schema)
    result = fingerprint(end.parameters)[:16]
    blob = ModelBlob(ModelFormat.GRID, ModelVersion(start), ModelVersion(end.version), result, payload)
    content = frame.to_frame(blob)
    ref = blob_ref(content, 4096)
    delta = ModelDelta(ModelVersion(start), ModelVersion(end.version), ref)
    head = msgspec.structs.replace(end.head, full_blob=OUT_OF_REACH, deltas=(delta,))
    plan_only = {
        topic: piece for topic, piece in end.blob_messages().items() if end.head.full_blob.id not in topic
    }
    world.broker.retained |= plan_only | {topics.BLOB_CHUNK.name(FLEET, blob=ref.id, index=0): content}
    sealed = seal(head, COORDINATOR_KEY, HEAD_DOMAIN)
    world.broker.take(Published(topics.HEAD.name(FLEET), sealed, 1, retain=True))


def test_an_agent_in_step_needs_no_keyframe(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        publish_only_the_delta(world, 1, Release(2), lead=1)
        update = await world.coordinator.updates.get()
        assert update.envelope.header.base_version == 2
        assert update.envelope.header.base_sha256 == fingerprint(Release(2).parameters)
        await world.stop()
        model = ModelSlots(world.state / "models", COORDINATOR_KEY.public).newest()
        assert model is not None
        assert (model.head.version, model.parameters.tolist()) == (2, [2, 2, 2])

    run(main)


def test_deltas_go_on_from_what_an_earlier_run_of_the_agent_installed(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: not world.outbox_files())
        await world.stop()
        publish_only_the_delta(world, 1, Release(4), lead=3)
        world.start(world.agent())
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 4
        await world.stop()

    run(main)


def test_a_coordinator_that_began_anew_at_the_same_version_costs_no_fetch(world: World) -> None:
    async def main() -> None:
        first = Release(1)
        await world.coordinator.publish(first)
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: not world.outbox_files())
        await world.stop()
        head = msgspec.structs.replace(first.head, epoch=first.head.epoch + 1, full_blob=OUT_OF_REACH)
        sealed = seal(head, COORDINATOR_KEY, HEAD_DOMAIN)
        world.broker.take(Published(topics.HEAD.name(FLEET), sealed, 1, retain=True))
        world.start(world.agent())
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 1
        await world.stop()

    run(main)


def test_a_delta_of_another_plan_is_not_added(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        publish_only_the_delta(world, 1, Release(2, plan=tiny_plan("another")), lead=1)
        keyframe = topics.BLOB_CHUNK.name(FLEET, blob=OUT_OF_REACH.id, index=0)
        await until(lambda: keyframe in world.broker.newest.asked)
        await world.stop()
        model = ModelSlots(world.state / "models", COORDINATOR_KEY.public).newest()
        assert model is not None
        assert model.head.version == 1

    run(main)
