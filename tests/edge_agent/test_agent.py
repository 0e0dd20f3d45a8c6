"""The agent and a scripted coordinator over a broker in memory: nothing is lost, forged or sent twice."""

import asyncio
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from agent_world import (
    COORDINATOR_KEY,
    DEVICE,
    DEVICE_KEY,
    EXAMPLES,
    FLEET,
    STRANGERS_KEY,
    MemoryConnection,
    Published,
    Release,
    World,
    agent_settings,
    receipt_for,
    run,
    until,
    workbench,
)

from edge_agent import agent as agent_module
from edge_agent import fetch
from edge_agent.agent import Agent, Tally
from edge_agent.data_sources import DataError
from edge_agent.dataset import Dataset
from edge_agent.local_update import TrainingDiverged
from edge_agent.plan_guard import PlanRefused
from edge_agent.plan_runtime import LocalResult, StepDeadlineExceeded
from edge_agent.plan_session import StepFailed
from edge_agent.settings import LocalTraining
from fedtide.wire import frame, topics
from fedtide.wire.link import LinkDown, PublishRefused
from fedtide.wire.messages import Reason, TrainingEvent, Verdict
from fedtide.wire.plan import PlanManifest
from fedtide.wire.seal import seal
from fedtide.wire.signatures import DOWN_DOMAIN, HEAD_DOMAIN, SigningKey


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.new(tmp_path)


@pytest.fixture(autouse=True)
def no_long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After trouble an agent rests for seconds; here, for milliseconds."""
    monkeypatch.setattr(agent_module, "_AFTER_FETCH_TROUBLE_S", 0.002)
    monkeypatch.setattr(agent_module, "_AFTER_LASTING_TROUBLE_S", 0.002)
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


@pytest.mark.parametrize(
    ("changes", "key", "domain"),
    [
        ({}, STRANGERS_KEY, DOWN_DOMAIN),
        ({}, DEVICE_KEY, DOWN_DOMAIN),
        ({}, COORDINATOR_KEY, HEAD_DOMAIN),
        ({"digest": bytes(32)}, COORDINATOR_KEY, DOWN_DOMAIN),
        ({"counter": 1}, COORDINATOR_KEY, DOWN_DOMAIN),
    ],
    ids=["a stranger's key", "the device's own key", "another purpose", "other bytes", "another update"],
)
def test_a_receipt_that_is_not_the_coordinators_for_these_bytes_does_not_empty_the_outbox(
    world: World, changes: dict[str, object], key: SigningKey, domain: bytes
) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        forged = msgspec.structs.replace(receipt_for(update), **changes)
        await world.coordinator.tell(forged, key=key, domain=domain)
        await world.coordinator.ask_for_all()  # it still has the update, so it sends it again
        again = await world.coordinator.updates.get()
        assert again.digest == update.digest
        assert world.outbox_files() == {f"{update.counter}.update"}
        assert agent.tally == Tally(trained=1, sent=2, resent=1)
        await world.stop()

    run(main)


def test_only_the_missing_chunks_are_sent_again(world: World) -> None:
    async def main() -> None:
        world.broker.max_packet_bytes = 1074  # chunks of 50 bytes
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


def test_the_answer_to_an_earlier_attempt_does_not_count_for_the_next(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        await world.coordinator.answer(update, Verdict.REJECTED, Reason.UNKNOWN_DEVICE, retry_after_s=0.002)
        await world.coordinator.updates.get()
        await world.coordinator.ask_for(update, 0)  # what it does if it waits for a new answer
        await until(lambda: len(world.coordinator.chunks) == 3)
        assert agent.tally.sent == 2
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
        world.broker.take(Published(topics.HEAD.name(FLEET), second.sealed_head, 1, retain=True))
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


def test_a_device_whose_newest_model_was_damaged_on_disk_runs_no_older_one(world: World) -> None:
    async def main() -> None:
        for version in (2, 3):
            await world.coordinator.publish(Release(version))
            world.start(world.agent())
            await world.coordinator.answer(await world.coordinator.updates.get())
            await until(lambda: not world.outbox_files())
            await world.stop()
        (newest,) = (
            slot
            for slot in (world.state / "models").glob("?.model")
            if Release(3).sealed_head in slot.read_bytes()
        )
        newest.write_bytes(newest.read_bytes().replace(Release(3).content, bytes(len(Release(3).content))))
        await world.coordinator.publish(Release(2))
        agent = world.agent()
        world.start(agent)
        await until(lambda: len(world.broker.connections) == 3 and agent._mailbox.connection is not None)
        await world.broker.newest.drained()
        await world.coordinator.publish(Release(4))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 4
        assert agent.tally.trained == 1
        await world.stop()

    run(main)


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The stable names of what was logged."""
    return [getattr(record, "event", "") for record in caplog.records]


def test_a_model_that_is_not_its_heads_is_not_installed_and_a_good_one_is(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        release, other = Release(1), Release(2)
        lying = msgspec.structs.replace(release.head, full_blob=other.head.full_blob)
        world.broker.retained |= release.blob_messages() | other.blob_messages()
        world.broker.retained[topics.HEAD.name(FLEET)] = seal(lying, COORDINATOR_KEY, HEAD_DOMAIN)
        agent = world.agent()
        world.start(agent)
        await until(lambda: "fetch.failed" in events(caplog))
        assert "a keyframe of version 2; announced was a keyframe of version 1" in caplog.text
        await world.coordinator.publish(other)
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 2
        assert agent.tally.trained == 1
        await world.stop()

    run(main)


def test_a_blob_that_was_cleared_is_given_up_for_the_next_version(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        for topic in Release(1).blob_messages():
            del world.broker.retained[topic]
        world.start(world.agent())
        await until(lambda: "fetch.failed" in events(caplog))
        await world.coordinator.publish(Release(2))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 2
        await world.stop()

    run(main)


def test_a_fetch_goes_on_over_a_new_connection(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        missing = [topic for topic in Release(1).blob_messages() if Release(1).head.full_blob.id in topic]
        kept = {topic: world.broker.retained.pop(topic) for topic in missing[1:]}
        world.start(world.agent())
        await until(lambda: any(missing[0] in each.filters for each in world.broker.connections))
        world.broker.newest.abort()
        world.broker.retained |= kept
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 1
        await world.stop()

    run(main)


@pytest.mark.parametrize(
    ("trouble", "event"),
    [
        (DataError("no such file"), "data.unusable"),
        (PlanRefused("an operator that plans do not have"), "plan.refused"),
        (TrainingDiverged("not finite"), "training.diverged"),
        (StepFailed("a label out of range"), "step.failed"),
        (StepDeadlineExceeded("a step took longer than 30 s"), "step.deadline"),
        (ValueError("another shape"), "training.failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_trouble_with_training_is_reported_and_training_goes_on_once_it_is_over(
    world: World, caplog: pytest.LogCaptureFixture, trouble: Exception, event: str
) -> None:
    failures = [trouble] * 3

    def examples(_manifest: PlanManifest) -> Dataset:
        if failures:
            raise failures.pop()
        return EXAMPLES

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        bench = replace(workbench(world.broker.dial, world.trainer), examples=examples)
        world.start(Agent(agent_settings(world.state), DEVICE_KEY, bench))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 1
        assert events(caplog).count(event) == 3
        assert str(trouble) in caplog.text
        await world.stop()

    run(main)


def test_an_update_that_the_broker_refuses_is_kept_and_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    take, refusals = world.broker.on_publish, [1, 2]

    def refuse(published: Published) -> None:
        if topics.UPDATE.parse(published.topic) and refusals:
            refusals.pop()
            raise PublishRefused("not authorized")
        take(published)

    async def main() -> None:
        world.broker.on_publish = refuse
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: agent.tally.applied == 1)
        assert agent.tally.trained == 1
        assert caplog.text.count("not authorized") == 2
        await world.stop()

    run(main)


def test_training_goes_on_while_the_network_is_away(world: World) -> None:
    async def main() -> None:
        training, finish = asyncio.Event(), asyncio.Event()

        async def slowly(work: Callable[[], LocalResult]) -> LocalResult:
            training.set()
            await finish.wait()
            return work()

        await world.coordinator.publish(Release(1))
        bench = replace(workbench(world.broker.dial, world.trainer), compute=slowly)
        agent = Agent(agent_settings(world.state), DEVICE_KEY, bench)
        world.start(agent)
        await training.wait()
        world.broker.reachable = False
        world.broker.newest.abort()
        await until(lambda: agent._mailbox.connection is None)
        finish.set()
        await until(lambda: len(world.outbox_files()) == 1)
        assert agent.tally == Tally(trained=1)
        world.broker.reachable = True
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: agent.tally.applied == 1)
        await world.stop()

    run(main)


def test_an_update_that_could_not_be_sent_for_long_gives_way_to_a_newer_one(world: World) -> None:
    async def main() -> None:
        training, finish = asyncio.Event(), asyncio.Event()

        async def slowly(work: Callable[[], LocalResult]) -> LocalResult:
            training.set()
            await finish.wait()
            return work()

        await world.coordinator.publish(Release(1))
        settings = agent_settings(world.state, training=LocalTraining(retrain_after_s=0.005))
        agent = Agent(
            settings, DEVICE_KEY, replace(workbench(world.broker.dial, world.trainer), compute=slowly)
        )
        world.start(agent)
        await training.wait()
        await world.coordinator.announce(online=False)
        await world.broker.newest.drained()
        finish.set()
        await until(lambda: agent.tally.trained >= 3)
        assert len(world.outbox_files()) == 1
        assert agent.tally.sent == 0
        await world.coordinator.announce(online=True)
        update = await world.coordinator.updates.get()
        assert world.outbox_files() == {f"{update.counter}.update"}
        await world.stop()

    run(main)


async def settled(world: World, agent: Agent) -> None:
    """The agent's update is answered, and whatever came is filed."""
    before = agent.tally.applied
    await world.coordinator.answer(await world.coordinator.updates.get())
    await until(lambda: agent.tally.applied == before + 1)
    await world.broker.newest.drained()


def test_a_version_is_trained_on_once(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        await settled(world, agent)
        await world.coordinator.publish(Release(1))
        await world.coordinator.publish(Release(2, training=False))
        await world.broker.newest.drained()
        await world.coordinator.publish(Release(3))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 3
        assert agent.tally.trained == 2
        await world.stop()

    run(main)


def test_a_device_that_may_trains_on_the_same_version_again(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent(training=LocalTraining(same_version_again=True))
        world.start(agent)
        for _ in range(3):
            await settled(world, agent)
        assert agent.tally.trained >= 3
        await world.stop()

    run(main)


def test_updates_go_to_the_devices_shard(world: World) -> None:
    async def main() -> None:
        await world.coordinator.announce(shards=5)
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        await world.coordinator.updates.get()
        shard = zlib.crc32(b"pump-7") % 5
        sent = {each.topic for each in world.broker.published if topics.UPDATE.parse(each.topic)}
        assert sent == {f"fl/1/pumps/up/{shard}/pump-7"}
        await world.stop()

    run(main)


def training_events(world: World) -> list[TrainingEvent]:
    topic = topics.EVENT.name(FLEET, device=DEVICE)
    published = [each for each in world.broker.published if each.topic == topic]
    assert all((each.qos, each.retain) == (0, False) for each in published)
    return [frame.from_frame(each.payload, TrainingEvent) for each in published]


def test_what_training_saw_is_told_once(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(4))
        world.start(world.agent())
        await world.coordinator.updates.get()
        (event,) = training_events(world)
        assert (event.version, event.num_examples, event.steps) == (4, 5, 1)
        assert (event.loss, event.metric) == (0.5, 0.75)
        assert event.seconds >= 0.0
        await world.stop()

    run(main)


def test_an_agent_that_ends_says_goodbye(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        await world.coordinator.updates.get()
        await world.stop()
        assert [presence.online for presence in world.presences()] == [True, False]
        assert world.broker.newest.ended == "closed"

    run(main)


def test_an_agent_that_is_cut_says_nothing(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        await world.coordinator.updates.get()
        agent.cut()
        await world.stop()
        assert [presence.online for presence in world.presences()] == [True]
        assert world.broker.newest.ended == "aborted"

    run(main)


def test_a_failure_of_our_own_ends_the_agent_instead_of_being_hidden(world: World) -> None:
    class Broken:
        def run_epochs(self, *_: object, **_more: object) -> LocalResult:
            raise ZeroDivisionError("a mistake of our own")

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = Agent(agent_settings(world.state), DEVICE_KEY, workbench(world.broker.dial, Broken()))
        with pytest.raises(ExceptionGroup) as failed:
            await agent.run()
        assert failed.group_contains(ZeroDivisionError)

    run(main)


def test_a_connection_that_is_found_dead_by_a_fetch_does_not_stop_everything_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work loop may see the end before the mailbox does; it must let the mailbox see it."""
    subscribe, lives = MemoryConnection.subscribe, [0, 20]

    async def dies(connection: MemoryConnection, filters: Sequence[str], *, qos: int = 1) -> None:
        if connection is not world.broker.connections[0] or topics.HEAD.name(FLEET) in filters:
            return await subscribe(connection, filters, qos=qos)
        connection.abort()
        lives[0] += 1
        if lives[0] > lives[1]:
            raise AssertionError("the work loop turns without letting anything else run")
        raise LinkDown("connection aborted")

    async def main() -> None:
        monkeypatch.setattr(MemoryConnection, "subscribe", dies)
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 1
        await world.stop()

    run(main)


def test_without_a_head_there_is_nothing_to_look_at_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(world.agent())
        await world.coordinator.updates.get()
        await world.stop()
        del world.broker.retained[topics.HEAD.name(FLEET)]
        agent, looks = world.agent(), 0
        look = agent._look_again_in_s

        def counted() -> float | None:
            nonlocal looks
            looks += 1
            return look()

        monkeypatch.setattr(agent, "_look_again_in_s", counted)
        world.start(agent)
        await settled(world, agent)  # and now it may train again, were there a head
        for _ in range(100):
            await asyncio.sleep(0)
        assert looks <= 1
        await world.stop()

    run(main)


def test_an_agent_that_is_cut_in_the_middle_of_a_fetch_ends(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        last = list(Release(1).blob_messages())[-1]
        del world.broker.retained[last]
        agent = world.agent()
        task = world.start(agent)
        await until(lambda: any(last in each.filters for each in world.broker.connections))
        agent.cut()
        task.cancel()
        ended, _ = await asyncio.wait([task], timeout=2.0)
        assert ended

    run(main)
