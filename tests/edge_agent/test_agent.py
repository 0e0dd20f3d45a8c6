"""The agent and a scripted coordinator over a broker in memory: nothing is lost, forged or sent twice."""

import asyncio
import logging
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import (
    DEVICE_KEY,
    STRANGERS_KEY,
    Release,
    ScriptedCoordinator,
    World,
    receipt_for,
    run,
    tiny_plan,
    until,
)

from edge_agent import agent as agent_module
from edge_agent import fetch
from edge_agent.agent import Agent, Tally
from edge_agent.data_sources import DataError
from edge_agent.outbox import Outbox
from edge_agent.plan_guard import PlanRefused
from edge_agent.settings import LocalTraining
from fedtide.wire import frame, topics
from fedtide.wire.messages import Reason, TrainingEvent, Verdict
from fedtide.wire.signatures import HEAD_DOMAIN

PRODUCER: Final = "a fleet's device"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.new(tmp_path)


@pytest.fixture(autouse=True)
def no_long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After trouble an agent rests for seconds; here, for milliseconds."""
    monkeypatch.setattr(agent_module, "_AFTER_FETCH_TROUBLE_S", 0.002)
    monkeypatch.setattr(agent_module, "_AFTER_TRAINING_TROUBLE_S", 0.002)
    monkeypatch.setattr(fetch, "_SILENCE_S", 0.05)


def test_it_fetches_trains_and_sends_an_update_that_the_device_signed(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(4, codec="q8"))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        update.envelope.verify(DEVICE_KEY.public)
        header = update.envelope.header
        assert (header.base_version, header.codec, header.num_examples) == (4, "q8", 5)
        assert update.delta == pytest.approx(np.ones(3), abs=1e-6)
        assert world.outbox_files() == {f"{update.counter}.update"}
        await world.stop()

    run(main)


def test_a_receipt_empties_the_outbox_and_a_new_version_is_trained_on(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        first = await world.coordinator.updates.get()
        await world.coordinator.answer(first)
        await until(lambda: agent.tally.applied == 1)
        assert world.outbox_files() == set()
        await world.coordinator.publish(Release(2))
        second = await world.coordinator.updates.get()
        assert (second.envelope.header.base_version, second.counter) == (2, first.counter + 1)
        assert agent.tally == Tally(trained=2, sent=2, applied=1)
        await world.stop()

    run(main)


@pytest.mark.parametrize(
    ("verdict", "reason", "tally"),
    [
        (Verdict.APPLIED, None, Tally(trained=1, sent=1, applied=1)),
        (Verdict.DUPLICATE, None, Tally(trained=1, sent=1, duplicate=1)),
        (Verdict.REJECTED, Reason.TOO_STALE, Tally(trained=1, sent=1, rejected=1)),
    ],
)
def test_every_verdict_but_unknown_device_settles_an_update(
    world: World, verdict: Verdict, reason: Reason | None, tally: Tally
) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        await world.coordinator.answer(await world.coordinator.updates.get(), verdict, reason)
        await until(lambda: agent.tally == tally)
        assert world.outbox_files() == set()
        await world.stop()

    run(main)


def test_forged_receipts_do_not_empty_the_outbox(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        receipt = receipt_for(update)
        await world.coordinator.tell(receipt, key=STRANGERS_KEY)
        await world.coordinator.tell(receipt, key=DEVICE_KEY)
        await world.coordinator.tell(receipt, domain=HEAD_DOMAIN)
        await world.coordinator.tell(msgspec.structs.replace(receipt, digest=bytes(32)))
        await world.coordinator.tell(msgspec.structs.replace(receipt, counter=update.counter - 1))
        await world.coordinator.ask_for_all()  # it still has the update, so it sends it again
        again = await world.coordinator.updates.get()
        assert again.digest == update.digest
        assert world.outbox_files() == {f"{update.counter}.update"}
        assert agent.tally == Tally(trained=1, sent=2, resent=1)
        await world.stop()

    run(main)


def test_only_the_missing_chunks_are_sent_again(world: World) -> None:
    async def main() -> None:
        world.broker.max_packet_bytes = 1124  # chunks of 100 bytes
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        sent = list(world.coordinator.chunks)
        assert [chunk.index for chunk in sent] == list(range(len(sent)))
        assert len(sent) > 4
        world.coordinator.chunks.clear()
        await world.coordinator.ask_for(update, 1, 3)
        await until(lambda: len(world.coordinator.chunks) == 2)
        await world.coordinator.ask_for(update, 2, 99_999, -1)
        await until(lambda: len(world.coordinator.chunks) == 3)
        assert world.coordinator.chunks == [sent[1], sent[3], sent[2]]
        await world.coordinator.answer(update)
        await until(lambda: agent.tally == Tally(trained=1, sent=1, applied=1))
        await world.stop()

    run(main)


def test_without_a_receipt_the_same_bytes_are_sent_again(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent(receipt_timeout_s=0.01))
        digests = [(await world.coordinator.updates.get()).digest for _ in range(4)]
        assert len(set(digests)) == 1
        assert world.trainer.runs == 1
        await world.stop()

    run(main)


def test_a_lost_connection_brings_the_update_again_on_the_next(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        world.broker.newest.abort()
        again = await world.coordinator.updates.get()
        assert again.digest == update.digest
        await world.coordinator.answer(again)
        await until(lambda: agent.tally.applied == 1)
        await world.stop()

    run(main)


def test_an_unknown_device_keeps_its_update_until_the_operator_has_enrolled_it(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        for _ in range(3):
            await world.coordinator.answer(
                update, Verdict.REJECTED, Reason.UNKNOWN_DEVICE, retry_after_s=0.002
            )
            again = await world.coordinator.updates.get()
            assert again.digest == update.digest
            assert world.outbox_files() == {f"{update.counter}.update"}
        await world.coordinator.answer(update)
        await until(lambda: agent.tally == Tally(trained=1, sent=4, applied=1))
        assert world.outbox_files() == set()
        await world.stop()

    run(main)


def test_a_coordinator_that_is_busy_is_given_time(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        began = asyncio.get_running_loop().time()
        await world.coordinator.publish(Release(2))
        await world.coordinator.answer(update, retry_after_s=0.05)
        await world.coordinator.updates.get()
        assert asyncio.get_running_loop().time() - began >= 0.05
        await world.stop()

    run(main)


def test_an_update_survives_a_restart_and_goes_before_any_training(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        update = await world.coordinator.updates.get()
        await world.stop()
        await world.coordinator.publish(Release(2))
        agent = world.agent()
        world.start(agent)
        again = await world.coordinator.updates.get()
        assert again.digest == update.digest
        assert agent.tally.trained == 0
        await world.coordinator.answer(again)
        newer = await world.coordinator.updates.get()
        assert newer.envelope.header.base_version == 2
        assert newer.counter > update.counter
        await world.stop()

    run(main)


def test_an_installed_model_is_not_fetched_again_after_a_restart(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: not world.outbox_files())
        await world.stop()
        for topic in Release(1).blob_messages():
            del world.broker.retained[topic]
        world.start(world.agent())
        update = await world.coordinator.updates.get()
        assert update.envelope.header.base_version == 1
        assert world.presences()[-1].model_version == 1
        await world.stop()

    run(main)


def test_a_plan_is_fetched_once(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        await world.coordinator.answer(await world.coordinator.updates.get())
        for topic in list(world.broker.retained):
            if Release(1).head.plan_blob.id in topic:
                del world.broker.retained[topic]
        second = Release(2)
        for topic, piece in second.blob_messages().items():
            if second.head.full_blob.id in topic:
                world.broker.retained[topic] = piece
        await world.coordinator._publish(topics.HEAD.name(second.fleet), second.sealed_head, True)
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 2
        await world.stop()

    run(main)


@pytest.mark.parametrize("older", [Release(2), Release(2, epoch=2), Release(9, epoch=0)])
def test_an_older_model_is_never_run_not_even_after_a_restart(world: World, older: Release) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(3))
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: not world.outbox_files())
        await world.stop()
        await world.coordinator.publish(older)
        agent = world.agent()
        world.start(agent)
        await until(lambda: len(world.broker.connections) == 2 and agent._mailbox.connection is not None)
        await world.broker.newest.drained()
        await world.coordinator.publish(Release(4, epoch=2))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 4
        assert agent.tally.trained == 1
        await world.stop()

    run(main)


def test_a_model_that_is_not_its_heads_is_not_installed_and_a_good_one_is(world: World) -> None:
    async def main() -> None:
        release, other = Release(1), Release(2)
        wrong = {
            topic: piece
            for topic, piece in release.blob_messages().items()
            if release.head.full_blob.id not in topic
        }
        head = msgspec.structs.replace(release.head, full_blob=other.head.full_blob)
        world.broker.retained |= wrong | other.blob_messages()
        lying = ScriptedCoordinator(world.coordinator._publish)
        await lying._publish(topics.HEAD.name(release.fleet), sealed(head), True)
        agent = world.agent()
        world.start(agent)
        await until(lambda: len(subscriptions(world)) > 0)
        await world.coordinator.publish(other)
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 2
        assert agent.tally.trained == 1
        await world.stop()

    run(main)
