"""An agent whose disk is full, fails or was damaged: it goes on, at once or after a start, and says so."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from agent_world import DEVICE, DEVICE_KEY, FLEET, Release, World, agent_settings, run, until, workbench
from coarse_codec import TABLE
from simulated_disk import Operation, SimulatedDisk, full

from edge_agent import agent as agent_module
from edge_agent.agent import Agent
from edge_agent.troubles import DiskFailed
from fedtide.wire import codecs, frame, topics
from fedtide.wire.messages import DeviceEvent, Trouble

STATE: Final = Path("/state")
OUTBOX: Final = STATE / "outbox"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(codecs, "CODECS", TABLE)
    monkeypatch.setattr(agent_module, "_AFTER_LASTING_TROUBLE_S", 0.02)
    return World.new(tmp_path)


@pytest.fixture
def disk() -> SimulatedDisk:
    made = SimulatedDisk()
    made.make_directory(STATE)
    return made


def agent_on(disk: SimulatedDisk, world: World) -> Agent:
    bench = replace(workbench(world.broker.dial, world.trainer), disk=disk)
    return Agent(agent_settings(STATE), DEVICE_KEY, bench)


def troubles(world: World) -> list[Trouble]:
    topic = topics.EVENT.name(FLEET, device=DEVICE)
    told = [
        frame.from_frame_any(each.payload, DeviceEvent)
        for each in world.broker.published
        if each.topic == topic
    ]
    return [each for each in told if isinstance(each, Trouble)]


def updates_on(disk: SimulatedDisk) -> list[Path]:
    return [path for path in disk.files() if path.suffix == ".update"]


def test_on_a_full_disk_an_agent_waits_for_room_and_keeps_what_it_has_trained(
    world: World, disk: SimulatedDisk
) -> None:
    def no_room_for_updates(operation: Operation) -> int | None:
        return full(operation) if operation.path.name.endswith(".update.new") else None

    async def main() -> None:
        await world.coordinator.publish(Release(1, codec="coarse"))
        disk.fail(no_room_for_updates)
        agent = agent_on(disk, world)
        world.start(agent)
        await until(lambda: bool(troubles(world)))
        assert troubles(world)[0].event == "disk.full"
        detail = troubles(world)[0].detail
        assert "No space left on device: '/state/outbox/" in detail
        assert "nothing is lost: make room on that disk" in detail
        assert updates_on(disk) == []
        disk.fail(None)
        update = await world.coordinator.updates.get()
        assert update.delta.tolist() == [0, 0, 0]  # of 1, in steps of 4
        assert world.trainer.runs == 1
        await world.coordinator.answer(update)
        await until(lambda: not updates_on(disk))
        await world.coordinator.publish(Release(2, codec="coarse"))
        await world.coordinator.updates.get()
        assert world.trainer.runs == 2
        await world.stop()

    run(main)


def test_on_a_full_disk_a_training_without_a_counter_is_done_again(world: World, disk: SimulatedDisk) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = agent_on(disk, world)
        disk.fail(lambda operation: full(operation) if operation.path.name == "counter.new" else None)
        world.start(agent)
        await until(lambda: world.trainer.runs > 1)
        disk.fail(None)
        await world.coordinator.updates.get()
        assert len(updates_on(disk)) == 1
        await world.stop()

    run(main)


def test_a_receipt_that_a_full_disk_did_not_take_is_not_asked_for_again(
    world: World, disk: SimulatedDisk
) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1, codec="coarse"))
        agent = agent_on(disk, world)
        world.start(agent)
        update = await world.coordinator.updates.get()
        disk.fail(full)
        await world.coordinator.answer(update)
        await until(lambda: bool(troubles(world)))
        assert troubles(world)[0].event == "disk.full"
        assert len(updates_on(disk)) == 1
        disk.fail(None)
        await until(lambda: not updates_on(disk))
        assert agent.tally.sent == 1
        assert agent.tally.applied == 1
        await world.coordinator.publish(Release(2, codec="coarse"))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 2
        await world.stop()

    run(main)


def test_on_a_disk_that_fails_an_agent_says_so_and_ends_and_the_next_one_goes_on(
    world: World, disk: SimulatedDisk
) -> None:
    fails: list[str] = []

    def once(operation: Operation) -> int | None:
        if fails or operation.kind != "sync" or operation.path.parent != OUTBOX:
            return None
        fails.append(operation.path.name)
        return errno.EIO

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        disk.fail(once)
        with pytest.raises(ExceptionGroup) as failed:
            await agent_on(disk, world).run()
        assert failed.group_contains(
            DiskFailed, match="Input/output error: '/state/outbox/counter.new'; the agent"
        )
        assert [each.event for each in troubles(world)] == ["disk.failed"]
        assert world.coordinator.updates.empty()
        world.start(agent_on(disk.killed(), world))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 1
        await world.stop()

    run(main)


def test_an_agent_starts_whatever_it_cannot_read(world: World, disk: SimulatedDisk) -> None:
    async def main() -> None:
        world.start(agent_on(disk, world))
        await world.coordinator.publish(Release(1, codec="coarse"))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await world.coordinator.publish(Release(2, codec="coarse"))
        await world.coordinator.updates.get()
        await world.stop()
        used = max(int(path.stem) for path in updates_on(disk))
        unreadable = disk.files()
        again = disk.killed()
        again.fail(
            lambda operation: errno.EIO if operation.kind == "read" and operation.path in unreadable else None
        )
        world.start(agent_on(again, world))
        update = await world.coordinator.updates.get()
        assert update.envelope.header.base_version == 2
        assert update.counter > used
        assert [each.event for each in troubles(world)] == ["outbox.damaged"]
        await world.stop()

    run(main)


def test_damage_in_the_outbox_is_told_once_even_if_training_goes_well(
    world: World, disk: SimulatedDisk
) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(agent_on(disk, world))
        await world.coordinator.updates.get()
        await world.stop()
        (file,) = updates_on(disk)
        disk.damage(file, disk.files()[file][:-1])
        for _ in range(2):
            agent = agent_on(disk, world)
            world.start(agent)
            update = await world.coordinator.updates.get()
            await world.coordinator.answer(update)
            await until(lambda tally=agent.tally: tally.applied == 1)
            await world.stop()
        (trouble,) = troubles(world)
        assert trouble.event == "outbox.damaged"
        assert trouble.detail == (
            f"damaged on disk: {file.name} in /state/outbox; if this comes again, replace the disk"
        )

    run(main)
