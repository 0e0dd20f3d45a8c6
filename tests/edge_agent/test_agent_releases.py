"""The released model on a device: always whole, never older, and beside training, not in its way."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from agent_world import (
    COORDINATOR_KEY,
    DEVICE,
    DEVICE_KEY,
    EXAMPLES,
    FLEET,
    AddOne,
    Release,
    World,
    agent_settings,
    run,
    tiny_plan,
    until,
    workbench,
)

from edge_agent import agent as agent_module
from edge_agent import fetch, models, reports
from edge_agent.agent import Agent
from edge_agent.data_sources import DataError
from edge_agent.dataset import Dataset
from edge_agent.inference import LocalModel, NoModel
from edge_agent.kept_state import Kept, KeptFile
from edge_agent.model_slots import ModelSlots, ReleasedModel
from edge_agent.plan_runtime import Evaluation, LocalResult
from edge_agent.plan_session import StepFailed
from edge_agent.settings import KEPT_FILE, Inference, LocalTraining
from fedtide.wire import frame, topics
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.frame import Message
from fedtide.wire.messages import DeviceEvent, EvaluationEvent, TrainingEvent, Trouble
from fedtide.wire.parameters import Schema, TensorSpec, Vector
from fedtide.wire.plan import Plan, PlanManifest

MANY = Dataset((np.arange(80, dtype=np.float32).reshape(40, 2),), np.zeros((40, 1), np.float32))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.new(tmp_path)


@pytest.fixture(autouse=True)
def no_long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "_AFTER_FETCH_TROUBLE_S", 0.002)
    monkeypatch.setattr(agent_module, "_AFTER_LASTING_TROUBLE_S", 0.002)
    monkeypatch.setattr(models, "_AFTER_FAILURE_S", 0.002)
    monkeypatch.setattr(reports, "_EVERY_S", 0.002)
    monkeypatch.setattr(fetch, "_SILENCE_S", 0.05)


def released(world: World) -> ReleasedModel | None:
    return ModelSlots(world.state / "models", COORDINATOR_KEY.public).released()


def version_released(world: World) -> int | None:
    model = released(world)
    return None if model is None else model.release.version


def chunks_fetched(world: World, release: Release) -> int:
    """How often chunks of a version's parameters were brought to the device."""
    blob = f"/b/{release.head.full_blob.id}/"
    return sum(blob in topic for connection in world.broker.connections for topic in connection.asked)


def test_without_a_gate_each_version_trained_on_is_the_released_one_and_is_written_once(world: World) -> None:
    async def main() -> None:
        for version in (1, 2, 3):
            await world.coordinator.publish(Release(version).itself())
            if version == 1:
                world.start(world.agent())
            update = await world.coordinator.updates.get()
            await world.coordinator.answer(update)
            await until(lambda version=version: version_released(world) == version)
            directory = world.state / "models"
            slot = directory / ("a.model" if version % 2 else "b.model")
            assert slot.samefile(directory / "released.model")
        await world.stop()

    run(main)


def test_a_release_is_kept_while_both_slots_go_on(world: World) -> None:
    async def main() -> None:
        good = Release(1)
        world.start(world.agent())
        for version in range(1, 6):
            await world.coordinator.publish(Release(version, released=good, gate="accuracy at least 0.9"))
            await world.coordinator.answer(await world.coordinator.updates.get())
        await world.stop()
        model = released(world)
        assert model is not None
        assert (model.release.version, model.release.gate) == (1, "accuracy at least 0.9")
        assert model.parameters.tolist() == [1, 1, 1]
        assert chunks_fetched(world, good) == 3  # all of them once, to be trained on

    run(main)


def test_a_version_that_passes_after_it_was_installed_is_not_fetched_again(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(4))
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        assert version_released(world) is None
        await world.coordinator.publish(Release(4).itself("it is good"))
        await until(lambda: version_released(world) == 4)
        assert chunks_fetched(world, Release(4)) == 3
        await world.stop()

    run(main)


def test_a_release_that_was_never_installed_is_fetched(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(9, released=Release(6)))
        world.start(world.agent())
        await until(lambda: version_released(world) == 6)
        await world.stop()

    run(main)


def test_the_last_version_is_had_although_training_has_ended(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(3, training=False).itself())
        agent = world.agent()
        world.start(agent)
        await until(lambda: version_released(world) == 3)
        assert agent.tally.trained == 0
        await world.stop()

    run(main)


def test_the_last_version_is_had_although_the_coordinator_left_an_update_unanswered(world: World) -> None:
    async def main() -> None:
        await world.coordinator.announce()
        await world.coordinator.publish(Release(1).itself())
        world.start(world.agent())
        await world.coordinator.updates.get()
        await world.coordinator.publish(Release(2, training=False).itself())
        await world.coordinator.announce(online=False)
        await until(lambda: version_released(world) == 2)
        assert len(world.outbox_files()) == 1
        await world.stop()

    run(main)


def test_a_device_without_data_has_the_release_all_the_same(world: World) -> None:
    def no_examples(_manifest: PlanManifest) -> Dataset:
        raise DataError("no such file")

    async def main() -> None:
        await world.coordinator.publish(Release(3).itself())
        bench = replace(workbench(world.broker.dial), examples=no_examples)
        world.start(Agent(agent_settings(world.state), DEVICE_KEY, bench))
        await until(lambda: version_released(world) == 3)
        await world.stop()

    run(main)


def test_a_device_that_shall_not_keeps_no_release_and_fetches_nothing_for_it(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(9, released=Release(6)))
        world.start(world.agent(inference=Inference(keep=False)))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await world.coordinator.publish(Release(10, released=Release(6)))
        await world.coordinator.updates.get()
        await world.stop()
        assert version_released(world) is None
        assert chunks_fetched(world, Release(6)) == 0

    run(main)


def test_an_idle_device_does_not_take_every_version(world: World) -> None:
    async def main() -> None:
        world.start(world.agent(inference=Inference(min_interval_s=1000.0)))
        await world.coordinator.publish(Release(1, training=False).itself())
        await until(lambda: version_released(world) == 1)
        for version in range(2, 6):
            await world.coordinator.publish(Release(version, training=False).itself())
        await world.broker.newest.drained()
        await asyncio.sleep(0.02)
        assert version_released(world) == 1
        await world.coordinator.publish(Release(6).itself())  # one to train on serves both
        await until(lambda: version_released(world) == 6)
        await world.stop()
        assert [chunks_fetched(world, Release(version)) for version in (1, 2, 5, 6)] == [3, 0, 0, 3]

    run(main)


def test_an_older_release_is_taken_only_from_a_later_run_of_the_coordinator(world: World) -> None:
    async def main() -> None:
        world.start(world.agent())
        await world.coordinator.publish(Release(5, released=Release(4)))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: version_released(world) == 4)
        await world.coordinator.publish(Release(6, released=Release(2)))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await asyncio.sleep(0.02)
        assert version_released(world) == 4
        await world.stop()
        world.start(world.agent())  # nor after a restart of the agent
        await world.coordinator.publish(Release(7, released=Release(3)))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await asyncio.sleep(0.02)
        assert version_released(world) == 4
        await world.coordinator.publish(Release(8, epoch=2, released=Release(2)))
        await until(lambda: version_released(world) == 2)
        await world.stop()

    run(main)


def test_a_release_whose_content_is_another_is_never_installed_and_training_goes_on(world: World) -> None:
    async def main() -> None:
        bad = Release(6)
        forged = Release(9, released=bad)
        await world.coordinator.publish(forged)
        for topic in [topic for topic in world.broker.retained if bad.head.full_blob.id in topic]:
            world.broker.retained[topic] = b"\x00" * len(world.broker.retained[topic])
        world.start(world.agent())
        await world.coordinator.answer(await world.coordinator.updates.get())
        await world.coordinator.publish(replace(forged, version=10, released=Release(7)))
        await world.coordinator.updates.get()
        await until(lambda: version_released(world) == 7)
        await world.stop()

    run(main)


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda content: content[:-3], lambda content: b"\0" + content]
)
def test_a_damaged_released_model_is_had_again(world: World, damage: Callable[[bytes], bytes]) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(9, released=Release(6), training=False))
        world.start(world.agent())
        await until(lambda: version_released(world) == 6)
        await world.stop()
        file = world.state / "models" / "released.model"
        file.write_bytes(damage(file.read_bytes()))
        assert version_released(world) is None
        world.start(world.agent())
        await until(lambda: version_released(world) == 6)
        await world.stop()

    run(main)


def test_the_plan_of_the_release_stays_while_others_come(tmp_path: Path) -> None:
    slots = ModelSlots(tmp_path, COORDINATOR_KEY.public, UNSYNCED_DISK)
    first = Release(1, plan=tiny_plan("line")).itself()
    slots.install_release(first.sealed_head, first.head, first.plan_blob, first.content)
    for version, name in enumerate(("curve", "wave", "step"), start=2):
        other = Release(version, plan=tiny_plan(name))
        slots.install(other.sealed_head, other.head, other.plan_blob, other.content)
    found = ModelSlots(tmp_path, COORDINATOR_KEY.public).released()
    assert found is not None
    assert found.plan == first.plan


def test_without_a_model_one_is_told_what_to_do(world: World) -> None:
    with pytest.raises(NoModel, match=r"no usable model in .*fedtide agent run"):
        LocalModel.open(world.state, COORDINATOR_KEY.public)
    assert not (world.state / "models").exists()  # looking makes nothing
    with pytest.raises(ValueError, match="give the coordinator's key"):
        LocalModel.open(world.state)


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (Release(7), "version 7 is installed, but the coordinator had released no version yet"),
        (Release(7, released=Release(5)), "version 7 is installed, but version 5, which is released, is not"),
    ],
)
def test_an_installed_version_that_is_not_released_is_not_used_unasked(
    tmp_path: Path, release: Release, said: str
) -> None:
    slots = ModelSlots(tmp_path / "models", COORDINATOR_KEY.public, UNSYNCED_DISK)
    slots.install(release.sealed_head, release.head, release.plan_blob, release.content)
    with pytest.raises(NoModel, match=said):
        LocalModel.open(tmp_path, str(COORDINATOR_KEY.public))


@dataclass
class CountingExamples:
    """An evaluator that notes what it was given; the loss is the version's own parameter."""

    seen: list[tuple[float, int]] = field(default_factory=list)
    fails: bool = False
    loss: float | None = None

    async def __call__(self, plan: Plan, parameters: Vector, dataset: Dataset) -> Evaluation:
        self.seen.append((float(parameters[0]), len(dataset)))
        if self.fails:
            raise StepFailed("a label out of range")
        return Evaluation(float(parameters[0]) if self.loss is None else self.loss, 0.75, len(dataset))


def evaluating(world: World, evaluator: CountingExamples, **bench: object) -> Agent:
    settings = agent_settings(
        world.state, training=LocalTraining(evaluation_share=0.3), inference=Inference(min_interval_s=0.0)
    )
    return Agent(
        settings,
        DEVICE_KEY,
        replace(
            workbench(world.broker.dial, world.trainer),
            **{"examples": lambda _: MANY, "evaluate": evaluator, **bench},  # type: ignore[arg-type]
        ),
    )


def told(world: World, kind: type[Message]) -> list[Message]:
    topic = topics.EVENT.name(FLEET, device=DEVICE)
    events = [
        frame.from_frame_any(each.payload, DeviceEvent)
        for each in world.broker.published
        if each.topic == topic
    ]
    return [event for event in events if isinstance(event, kind)]


def test_each_version_is_evaluated_on_what_is_held_out_before_it_is_trained_on(world: World) -> None:
    evaluator = CountingExamples()

    async def main() -> None:
        world.start(evaluating(world, evaluator))
        for version in (1, 2):
            await world.coordinator.publish(Release(version))
            update = await world.coordinator.updates.get()
            assert len(evaluator.seen) == version
            _, held_out = evaluator.seen[-1]
            assert 0 < held_out < 40
            assert update.envelope.header.num_examples == 40 - held_out
            await world.coordinator.answer(update)
            await until(
                lambda version=version: [e.version for e in told(world, EvaluationEvent)][-1:] == [version]
            )
        event = told(world, EvaluationEvent)[-1]
        assert (event.version, event.num_examples, event.loss, event.metric) == (2, held_out, 2.0, 0.75)
        await world.stop()

    run(main)


def test_a_device_that_does_not_train_evaluates_too(world: World) -> None:
    evaluator = CountingExamples()

    async def main() -> None:
        agent = evaluating(world, evaluator)
        world.start(agent)
        await world.coordinator.publish(Release(1))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await world.coordinator.publish(Release(2, training=False))
        await until(lambda: [each.version for each in told(world, EvaluationEvent)][-1:] == [2])
        assert agent.tally.trained == 1
        await world.stop()

    run(main)


def test_an_evaluation_that_fails_is_told_and_does_not_stop_the_training(world: World) -> None:
    evaluator = CountingExamples(fails=True)

    async def main() -> None:
        world.start(evaluating(world, evaluator))
        await world.coordinator.publish(Release(1))
        await world.coordinator.updates.get()
        (trouble,) = told(world, Trouble)
        assert (trouble.event, trouble.detail, trouble.version) == ("step.failed", "a label out of range", 1)
        assert len(evaluator.seen) == 1
        await world.stop()

    run(main)


def test_an_evaluation_that_is_not_finite_is_not_told(world: World) -> None:
    async def main() -> None:
        world.start(evaluating(world, CountingExamples(loss=float("nan"))))
        await world.coordinator.publish(Release(1))
        await world.coordinator.updates.get()
        await until(lambda: bool(told(world, TrainingEvent)))
        assert told(world, EvaluationEvent) == []
        await world.stop()

    run(main)


def test_lasting_trouble_is_told_when_it_changes_and_a_training_ends_it(world: World) -> None:
    def details() -> list[str]:
        return [event.detail for event in told(world, Trouble) if isinstance(event, Trouble)]

    def examples(_manifest: PlanManifest) -> Dataset:
        if not details():
            raise DataError("no such file")
        if len(details()) == 1:
            raise DataError("empty")
        return EXAMPLES

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        bench = replace(workbench(world.broker.dial, world.trainer), examples=examples)
        world.start(Agent(agent_settings(world.state), DEVICE_KEY, bench))
        await world.coordinator.updates.get()
        await until(lambda: bool(told(world, TrainingEvent)))
        assert details() == ["no such file", "empty"]
        await world.stop()

    run(main)


def test_a_device_whose_examples_are_all_held_out_says_so(world: World) -> None:
    same = Dataset((np.ones((9, 2), np.float32),), np.zeros((9, 1), np.float32))  # copies share a side

    async def main() -> None:
        agent = evaluating(world, CountingExamples(), examples=lambda _: same)
        share = LocalTraining(evaluation_share=0.999)
        agent._settings = msgspec.structs.replace(agent._settings, training=share)
        world.start(agent)
        await world.coordinator.publish(Release(1))
        await until(lambda: bool(told(world, Trouble)))
        (trouble,) = told(world, Trouble)
        assert isinstance(trouble, Trouble)
        assert trouble.event == "data.unusable"
        assert "all 9 examples are held out" in trouble.detail
        await world.stop()

    run(main)


def test_a_moment_that_passes_while_one_looks_is_not_missed(world: World) -> None:
    """The rest ends after it was found to be too early to train, and before one goes to sleep until then."""
    agent = world.agent()
    agent._rest_until = time.monotonic() + 0.001
    wanted = agent._is_wanted(Release(1).head)
    while time.monotonic() < agent._rest_until:
        pass
    assert wanted or agent._look_again_in_s() == 0.0
    assert agent._is_wanted(Release(1).head)
    assert agent._look_again_in_s() is None


def test_the_devices_own_statistics_stay_and_are_evaluated_with(world: World) -> None:
    """A plan whose bias is the device's own: it starts from the global one and goes on from its own."""
    manifest = msgspec.structs.replace(
        tiny_plan().manifest,
        buffers="local",
        schema=Schema(
            tensors=(
                TensorSpec(name="p.slope", dtype="float32", shape=(2, 1)),
                TensorSpec(name="b.bias", dtype="float32", shape=()),
            )
        ),
    )
    plan = replace(tiny_plan(), manifest=manifest)
    evaluated: list[list[float]] = []
    given: list[Kept] = []

    class KeepsSeven(AddOne):
        def run_epochs(self, *positional: Any, **more: Any) -> LocalResult:
            given.append(more["kept"])
            kept = Kept(statistics=(np.array(7.0, np.float32),))
            return replace(super().run_epochs(*positional), kept=kept)

    async def evaluate(plan: Plan, parameters: Vector, dataset: Dataset) -> Evaluation:
        evaluated.append(parameters.tolist())
        return Evaluation(0.5, 0.5, len(dataset))

    async def main() -> None:
        agent = evaluating(world, CountingExamples(), evaluate=evaluate, trainer=lambda _: KeepsSeven())
        world.start(agent)
        for version in (1, 2):
            await world.coordinator.publish(Release(version, plan=plan))
            await world.coordinator.answer(await world.coordinator.updates.get())
            await until(lambda: not world.outbox_files())
        await world.stop()

    run(main)
    assert evaluated == [[1, 1, 1], [2, 2, 7]]
    assert [bool(kept) for kept in given] == [False, True]
    assert KeptFile(world.state / KEPT_FILE).of(plan).statistics[0] == 7.0
