"""The whole agent: what an update leaves out goes with the next one, as its receipts say, over restarts."""

import asyncio
import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
from agent_world import COORDINATOR_KEY, DEVICE, FLEET, AddOne, Arrived, Release, World, run, until
from coarse_codec import TABLE

from edge_agent import agent as agent_module
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import LocalResult
from edge_agent.settings import FEEDBACK_FILE, LocalTraining
from fedtide.wire import codecs, frame, topics
from fedtide.wire.ids import Counter
from fedtide.wire.messages import CodecRequest, Reason, Trouble, Verdict
from fedtide.wire.parameters import Vector
from fedtide.wire.seal import seal
from fedtide.wire.signatures import HEAD_DOMAIN
from fedtide.wire.training import Training


class AddFive(AddOne):
    """A trainer that adds 5 to every parameter; in steps of 4, 1 of it is left out."""

    def run_epochs(
        self,
        parameters: Vector,
        dataset: Dataset,
        _training: Training,
        _rng: np.random.Generator,
        **_more: object,
    ) -> LocalResult:
        self.runs += 1
        return LocalResult(parameters + np.float32(5), len(dataset), 1, loss=0.5, metric=0.75)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(codecs, "CODECS", TABLE)
    monkeypatch.setattr(agent_module, "_AFTER_LASTING_TROUBLE_S", 0.002)
    made = World.new(tmp_path)
    made.trainer = AddFive()
    return made


async def next_update(world: World, version: int, codec: str = "coarse") -> Arrived:
    """What the device sends after training on a new version."""
    await world.coordinator.publish(Release(version, codec=codec))
    return await world.coordinator.updates.get()


def of(update: Arrived) -> float:
    """What an update adds to each parameter."""
    (value,) = set(update.delta.tolist())
    return float(value)


def test_a_receipt_drains_what_was_sent_and_a_rejection_returns_it(world: World) -> None:
    async def main() -> None:
        world.start(world.agent())
        sent = []
        answers = [
            (Verdict.APPLIED, None),
            (Verdict.REJECTED, Reason.TOO_STALE),
            (Verdict.DUPLICATE, None),
            (Verdict.APPLIED, None),
        ]
        for version, (verdict, reason) in enumerate(answers):
            update = await next_update(world, version)
            sent.append(of(update))
            await world.coordinator.answer(update, verdict, reason)
        # 5 → 4, applied, 1 left; 6 → 4, rejected, 6 left; 11 → 8, applied before, 3 left; 8 → 8.
        assert sent == [4, 4, 8, 8]
        await world.stop()

    run(main)


def test_a_refusal_without_a_judgement_carries_nothing_on(world: World) -> None:
    async def main() -> None:
        world.start(world.agent())
        sent = []
        for version, reason in enumerate([Reason.TOO_STALE, Reason.REPLAYED_COUNTER, Reason.TOO_STALE]):
            update = await next_update(world, version)
            sent.append(of(update))
            await world.coordinator.answer(update, Verdict.REJECTED, reason)
        assert sent == [4, 8, 4]  # of 5; 10, and nobody knows whether it had come before; 5
        await world.stop()

    run(main)


def test_it_goes_on_after_restarts_whatever_was_on_its_way(world: World) -> None:
    sent: dict[Counter, float] = {}

    async def answer_all() -> None:
        while True:
            update = await world.coordinator.updates.get()
            known = update.counter in sent
            sent[update.counter] = of(update)
            await world.coordinator.answer(update, Verdict.DUPLICATE if known else Verdict.APPLIED)

    async def main() -> None:
        world.start(world.agent())
        first = await next_update(world, 1)
        sent[first.counter] = of(first)  # applied, and its receipt is lost
        await world.stop()
        answering = asyncio.create_task(answer_all())
        while len(sent) < 6:
            agent = world.agent()
            world.start(agent)
            await until(lambda tally=agent.tally: tally.applied + tally.duplicate > 0)
            await world.stop()
        answering.cancel()

    run(main)
    # 5 → 4, 1 left; 6 → 4, 2 left; 7 → 4, 3 left; 8 → 8, and so on from the beginning.
    assert list(sent) == sorted(sent)
    assert list(sent.values()) == ([4, 4, 4, 8] * len(sent))[: len(sent)]


def test_an_update_with_feedback_waits_as_long_as_it_takes_and_is_sent_once(world: World) -> None:
    async def main() -> None:
        agent = world.agent(training=LocalTraining(retrain_after_s=0.001))
        await world.coordinator.publish(Release(1, codec="coarse"))
        await world.coordinator.announce(online=False)
        world.start(agent)
        await until(lambda: agent.tally.trained == 1)
        for _ in range(100):  # with retrain_after_s over again and again, another update would be made
            await asyncio.sleep(0.001)
        await world.coordinator.announce(online=True)
        update = await world.coordinator.updates.get()
        assert of(update) == 4
        assert agent.tally.trained == 1
        await world.stop()

    run(main)


def test_an_update_with_a_codec_without_a_rate_takes_along_all_there_is(world: World) -> None:
    async def main() -> None:
        world.start(world.agent())
        sent = []
        for version, codec in enumerate(["coarse", "coarse", "float32", "float32", "coarse"]):
            update = await next_update(world, version, codec)
            sent.append(of(update))
            await world.coordinator.answer(update)
        assert sent == [4, 4, 7, 5, 4]  # of 5, 6, 7 and then 5 and 5
        await world.stop()

    run(main)


def test_a_device_whose_codec_needs_no_feedback_writes_none(world: World) -> None:
    async def main() -> None:
        agent = world.agent()
        world.start(agent)
        await world.coordinator.answer(await next_update(world, 1, "q8"))
        await until(lambda: agent.tally.applied == 1)
        assert not list(world.state.glob(f"{FEEDBACK_FILE}*"))
        await world.stop()

    run(main)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (CodecRequest(id="zfp"), "unknown codec 'zfp'; this build has float32"),
        (CodecRequest(id="coarse", parameters={"stop": 8.0}), "codec coarse has no parameter 'stop'"),
        (CodecRequest(id="coarse", parameters={"step": -1.0}), "step = -1; it must be above 0"),
        (CodecRequest(id="q8", parameters={"step": 8.0}), "codec q8 has no parameter 'step'"),
    ],
    ids=["another codec", "another parameter", "out of range", "no parameters"],
)
def test_what_a_head_cannot_have_is_told_before_anything_is_trained(
    world: World, asked: CodecRequest, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        release = Release(1)
        world.broker.retained |= release.blob_messages()
        head = msgspec.structs.replace(release.head, update_codec=asked)
        world.broker.retained[topics.HEAD.name(FLEET)] = seal(head, COORDINATOR_KEY, HEAD_DOMAIN)
        world.start(world.agent())
        await until(lambda: caplog.text.count(complaint) >= 3)  # it does not end, and it does not spin
        assert world.trainer.runs == 0
        events = topics.EVENT.name(FLEET, device=DEVICE)
        told = [each.payload for each in world.broker.published if each.topic == events]
        assert complaint in frame.from_frame(told[0], Trouble).detail
        await world.coordinator.answer(await next_update(world, 2))
        await world.stop()

    with caplog.at_level(logging.ERROR):
        run(main)
