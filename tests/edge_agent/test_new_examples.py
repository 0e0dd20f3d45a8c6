"""Whether enough examples have come: the rule, its memory on disk, and an agent that waits."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from agent_world import DEVICE_KEY, Release, World, agent_settings, run, until, workbench
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import agent as agent_module
from edge_agent.agent import Agent
from edge_agent.dataset import Dataset
from edge_agent.new_examples import Shortage, TrainedTo, shortage
from edge_agent.settings import LocalTraining
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.plan import PlanManifest


def dataset(count: int, *arrived: int) -> Dataset:
    marks = np.array(arrived, np.int64) if arrived else None
    return Dataset((np.zeros((count, 2), np.float32),), arrived=marks)


@pytest.mark.parametrize(
    ("there", "thresholds", "missing"),
    [
        (dataset(5), {"needed": 5}, None),
        (dataset(4), {"needed": 5}, Shortage(4, 5, new=False)),
        (dataset(0), {"needed": 1}, Shortage(0, 1, new=False)),
        # Never trained: all are new.
        (dataset(5), {"needed": 1, "needed_new": 5}, None),
        (dataset(5), {"needed": 1, "needed_new": 6}, Shortage(5, 6, new=True)),
        # Trained when there were 3.
        (dataset(5), {"needed": 1, "needed_new": 2, "trained_to": 3}, None),
        (dataset(5), {"needed": 1, "needed_new": 3, "trained_to": 3}, Shortage(2, 3, new=True)),
        (dataset(5), {"needed": 1, "needed_new": 1, "trained_to": 5}, Shortage(0, 1, new=True)),
        # Without a threshold of new ones, old ones will do.
        (dataset(5), {"needed": 1, "trained_to": 5}, None),
        # A file that was written again and is shorter begins anew.
        (dataset(2), {"needed": 1, "needed_new": 2, "trained_to": 5}, None),
        # By the source's own count.
        (dataset(3, 70, 80, 90), {"needed": 1, "needed_new": 2, "trained_to": 70}, None),
        (
            dataset(3, 70, 80, 90),
            {"needed": 1, "needed_new": 2, "trained_to": 80},
            Shortage(1, 2, new=True),
        ),
        (dataset(3, 70, 80, 90), {"needed": 1, "needed_new": 3, "trained_to": 1000}, None),
    ],
)
def test_a_device_trains_when_enough_have_come(
    there: Dataset, thresholds: dict[str, Any], missing: Shortage | None
) -> None:
    assert shortage(there, **thresholds) == missing


def test_a_shortage_says_what_is_missing() -> None:
    assert str(Shortage(3, 10, new=False)) == "3 of the 10 examples needed to train"
    assert str(Shortage(3, 10, new=True)) == "3 of the 10 new examples needed to train again"


@given(batches=st.lists(st.integers(0, 30), max_size=20), needed_new=st.integers(1, 40))
def test_every_training_has_had_its_new_examples(batches: list[int], needed_new: int) -> None:
    total, trained_to, trainings = 0, None, []
    for count in batches:
        total += count
        there = Dataset((np.zeros((total, 1)),))
        if shortage(there, needed=1, needed_new=needed_new, trained_to=trained_to) is None:
            trainings.append(total - (trained_to or 0))
            trained_to = there.newest
    assert all(new >= needed_new for new in trainings)
    assert total - (trained_to or 0) < needed_new


def test_what_was_trained_on_is_remembered_over_restarts(tmp_path: Path) -> None:
    file = tmp_path / "trained-to"
    trained = TrainedTo(file)
    assert trained.mark is None
    trained.note(7)
    trained.note(1_700_000_000_000_000_000)
    assert TrainedTo(file).mark == 1_700_000_000_000_000_000


def test_the_same_again_is_not_written_again(tmp_path: Path) -> None:
    trained = TrainedTo(tmp_path / "trained-to", UNSYNCED_DISK)
    trained.note(7)
    (tmp_path / "trained-to").unlink()
    trained.note(7)
    assert not (tmp_path / "trained-to").exists()


@pytest.mark.parametrize("content", [b"", b"seven", b"\xff\xfe", b"1.5"])
def test_a_damaged_memory_makes_all_examples_new(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trained-to").write_bytes(content)
    assert TrainedTo(tmp_path / "trained-to").mark is None


# An agent that waits.


class Growing:
    """A data source that examples come to, and how often it was read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read = 0

    def __call__(self, _manifest: PlanManifest) -> Dataset:
        self.read += 1
        return Dataset((np.ones((self.count, 2), np.float32),), np.zeros((self.count, 1), np.float32))


@pytest.fixture(autouse=True)
def looks_every_few_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "FIRST_LOOK_S", 0.002)
    monkeypatch.setattr(agent_module, "LONGEST_LOOK_S", 0.004)


def waiting_agent(
    world: World, examples: Growing, training: LocalTraining | None = None, **thresholds: int
) -> Agent:
    settings = agent_settings(world.state, training=training)
    data = msgspec.structs.replace(settings.data, **thresholds)
    bench = replace(workbench(world.broker.dial, world.trainer), examples=examples)
    return Agent(msgspec.structs.replace(settings, data=data), DEVICE_KEY, bench)


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if getattr(record, "event", "") == "examples.awaited"]


def test_an_agent_waits_for_its_first_examples_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world, examples = World.new(tmp_path), Growing(3)

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(waiting_agent(world, examples, min_examples=5))
        await until(lambda: examples.read > 5)
        assert world.trainer.runs == 0
        examples.count = 5
        update = await world.coordinator.updates.get()
        assert update.envelope.header.num_examples == 5
        await world.stop()

    run(main)
    assert waits(caplog) == ["Waiting: there are 3 of the 5 examples needed to train"]


def test_an_agent_waits_for_new_examples_and_fetches_nothing_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world, examples = World.new(tmp_path), Growing(10)

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(waiting_agent(world, examples, min_new_examples=4))
        update = await world.coordinator.updates.get()
        examples.count = 13
        await world.coordinator.publish(Release(2))
        await world.coordinator.answer(update)
        seen = examples.read
        await until(lambda: examples.read > seen + 5)
        assert world.trainer.runs == 1
        await world.coordinator.publish(Release(3))
        seen = examples.read
        await until(lambda: examples.read > seen + 2)
        chunk_of_2 = next(iter(Release(2).blob_messages()))
        assert chunk_of_2 not in world.broker.newest.filters
        examples.count = 14
        update = await world.coordinator.updates.get()
        assert update.envelope.header.base_version == 3
        assert world.trainer.runs == 2
        await world.stop()

    run(main)
    assert waits(caplog) == ["Waiting: there are 3 of the 4 new examples needed to train again"]


def test_an_agent_remembers_over_a_restart_what_it_was_trained_on(tmp_path: Path) -> None:
    world, examples = World.new(tmp_path), Growing(10)

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(waiting_agent(world, examples, min_new_examples=4))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: not world.outbox_files())
        await world.stop()
        await world.coordinator.publish(Release(2))
        seen = examples.read
        world.start(waiting_agent(world, examples, min_new_examples=4))
        await until(lambda: examples.read > seen + 5)
        assert world.trainer.runs == 1
        examples.count = 14
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 2
        await world.stop()

    run(main)


def test_an_agent_without_thresholds_trains_on_every_version_and_writes_no_mark(tmp_path: Path) -> None:
    world, examples = World.new(tmp_path), Growing(2)

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(waiting_agent(world, examples))
        for version in (1, 2, 3):
            update = await world.coordinator.updates.get()
            assert update.envelope.header.base_version == version
            await world.coordinator.publish(Release(version + 1))
            await world.coordinator.answer(update)
        await world.stop()

    run(main)
    assert not (tmp_path / "trained-to").exists()


def test_an_update_that_waits_for_long_is_replaced_without_new_examples(tmp_path: Path) -> None:
    """Its examples were trained on, but nobody has it yet; without a training it would wait for them."""
    world, examples = World.new(tmp_path), Growing(10)

    async def main() -> None:
        await world.coordinator.announce(online=False)
        await world.coordinator.publish(Release(1))
        agent = waiting_agent(
            world, examples, training=LocalTraining(retrain_after_s=0.005), min_new_examples=4
        )
        world.start(agent)
        await until(lambda: agent.tally.trained >= 3)
        await world.coordinator.announce(online=True)
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: not world.outbox_files())
        await world.stop()

    run(main)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds


def test_a_look_that_falls_due_while_the_agent_decides_is_not_missed(tmp_path: Path) -> None:
    world, clock = World.new(tmp_path), Clock()

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = waiting_agent(world, Growing(3), min_new_examples=2)
        world.start(agent)
        await world.coordinator.answer(await world.coordinator.updates.get())
        await until(lambda: not world.outbox_files())
        await world.stop()
        agent._clock = clock
        agent._look_after = agent._rest_until = 0.0
        agent._look_after = clock.now() + 3.0
        assert not agent._is_wanted(Release(2).head)
        clock.seconds += 5.0
        assert agent._look_again_in_s() == 0.0

    run(main)
