"""An agent beside what is out of step: an earlier run of the coordinator, other builds, wrong clocks."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from agent_world import (
    COORDINATOR_KEY,
    DEVICE,
    DEVICE_KEY,
    FLEET,
    Arrived,
    Release,
    World,
    agent_settings,
    receipt_for,
    run,
    until,
    workbench,
)

from edge_agent import agent as agent_module
from edge_agent.agent import Agent
from edge_agent.sender import Tally
from fedtide.wire import frame, topics
from fedtide.wire.ids import Epoch
from fedtide.wire.messages import (
    CoordinatorState,
    DeviceEvent,
    MissingChunks,
    Presence,
    Reason,
    Trouble,
    Verdict,
)
from fedtide.wire.seal import seal
from fedtide.wire.signatures import COORDINATOR_DOMAIN

TEN_YEARS_S = 10 * 365.25 * 86_400


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.new(tmp_path)


@pytest.fixture(autouse=True)
def no_long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "_AFTER_LASTING_TROUBLE_S", 0.002)


async def first_update(world: World, agent: Agent) -> Arrived:
    """What an agent sends first, to a coordinator of epoch 5."""
    await world.coordinator.announce(epoch=5)
    await world.coordinator.publish(Release(1, epoch=5))
    world.start(agent)
    return await world.coordinator.updates.get()


async def settled(world: World) -> None:
    """Until what was delivered has been filed and whoever waited for it has acted."""
    await world.broker.newest.drained()
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "after a restart"])
def test_a_receipt_of_an_earlier_epoch_does_not_empty_the_outbox(world: World, *, restarted: bool) -> None:
    async def main() -> None:
        agent = world.agent()
        update = await first_update(world, agent)
        if restarted:
            await world.stop()
            # Nothing says the epoch now but the head that the installed model keeps.
            world.broker.retained.clear()
            agent = world.agent()
            world.start(agent)
            update = await world.coordinator.updates.get()
        await world.coordinator.answer(update, epoch=Epoch(4))
        await world.coordinator.ask_for_all()
        again = await world.coordinator.updates.get()
        assert again.digest == update.digest
        assert world.outbox_files() == {f"{update.counter}.update"}
        await world.coordinator.answer(update, epoch=Epoch(5))
        await until(lambda: agent.tally.applied == 1)
        assert world.outbox_files() == set()
        await world.stop()

    run(main)


def test_a_missing_list_of_an_earlier_epoch_brings_no_chunks(world: World) -> None:
    async def main() -> None:
        world.broker.max_packet_bytes = 400
        update = await first_update(world, world.agent())
        sent = len(world.coordinator.chunks)
        assert sent > 2
        asked = MissingChunks(
            device=DEVICE, epoch=Epoch(4), counter=update.counter, digest=update.digest, indexes=(0,)
        )
        await world.coordinator.tell(asked)
        await settled(world)
        await world.coordinator.tell(msgspec.structs.replace(asked, epoch=Epoch(5), indexes=(1,)))
        await until(lambda: len(world.coordinator.chunks) > sent)
        assert [chunk.index for chunk in world.coordinator.chunks[sent:]] == [1]
        await world.stop()

    run(main)


def test_the_will_of_an_earlier_run_does_not_stop_a_device(world: World) -> None:
    async def main() -> None:
        agent = world.agent()
        await world.coordinator.answer(await first_update(world, agent), epoch=Epoch(5))
        await world.coordinator.announce(online=False, epoch=4)
        await world.coordinator.publish(Release(2, epoch=5))
        assert (await world.coordinator.updates.get()).envelope.header.base_version == 2
        await world.stop()

    run(main)


def troubles(world: World) -> list[Trouble]:
    topic = topics.EVENT.name(FLEET, device=DEVICE)
    events = [
        frame.from_frame_any(each.payload, DeviceEvent)
        for each in world.broker.published
        if each.topic == topic
    ]
    return [event for event in events if isinstance(event, Trouble)]


def state(spoken: tuple[int, int]) -> bytes:
    message = CoordinatorState(
        fleet=FLEET, epoch=Epoch(5), online=True, protocol_min=spoken[0], protocol_max=spoken[1]
    )
    return seal(message, COORDINATOR_KEY, COORDINATOR_DOMAIN)


@pytest.mark.parametrize(
    ("foreign", "who"),
    [
        (state((2, 3)), "upgrade fedtide at the sender"),
        (b"\x02 what version 2 puts here", "upgrade fedtide at the receiver"),
    ],
    ids=["it says which versions it takes", "it says so in a version of its own"],
)
def test_nothing_is_sent_to_a_coordinator_of_another_protocol_and_the_device_says_why(
    world: World, foreign: bytes, who: str
) -> None:
    async def main() -> None:
        world.broker.retained[topics.COORDINATOR.name(FLEET)] = foreign
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        await until(lambda: agent.tally.trained == 1 and bool(troubles(world)))
        (told,) = troubles(world)
        assert told.event == "protocol.unsupported"
        assert told.detail.endswith(who)
        assert world.coordinator.chunks == []
        waiting = world.outbox_files()
        assert len(waiting) == 1

        await world.coordinator.announce(epoch=6)  # protocol_min = protocol_max = 1
        update = await world.coordinator.updates.get()
        assert {f"{update.counter}.update"} == waiting
        await world.stop()

    run(main)


def test_presence_says_which_protocol_the_agent_speaks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "PROTOCOL_VERSION", 3)

    async def main() -> None:
        world.start(world.agent())
        topic = topics.PRESENCE.name(FLEET, device=DEVICE)
        await until(lambda: topic in world.broker.retained)
        assert frame.from_frame(world.broker.retained[topic], Presence).protocol == 3
        await world.stop()

    run(main)


@dataclass
class JumpingClock:
    """Runs evenly, and shows whatever date a test sets."""

    date: float
    elapsed: float = 0.0

    def now(self) -> float:
        self.elapsed += 1e-3
        return self.elapsed

    def wall(self) -> float:
        return self.date


def agent_with(world: World, clock: JumpingClock) -> Agent:
    bench = workbench(world.broker.dial, world.trainer)
    return Agent(agent_settings(world.state), DEVICE_KEY, replace(bench, clock=clock))


@pytest.mark.parametrize("jump_s", [-TEN_YEARS_S, TEN_YEARS_S], ids=["ten years back", "ten years ahead"])
def test_a_clock_that_jumps_during_a_run_harms_nothing(world: World, jump_s: float) -> None:
    async def main() -> None:
        clock = JumpingClock(1_700_000_000.0)
        agent = agent_with(world, clock)
        counters = []
        world.start(agent)
        for version in range(1, 6):
            await world.coordinator.publish(Release(version))
            update = await world.coordinator.updates.get()
            counters.append(update.counter)
            clock.date += jump_s if version % 2 else -jump_s
            await world.coordinator.answer(update)
            await until(lambda done=version: agent.tally.applied == done)  # type: ignore[misc]
        assert counters == list(range(counters[0], counters[0] + 5))
        assert agent.tally == Tally(trained=5, sent=5, applied=5)
        await world.stop()

    run(main)


def test_a_clock_before_1970_begins_with_a_counter_that_can_be_sent(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        world.start(agent_with(world, JumpingClock(-86_400.0)))
        assert (await world.coordinator.updates.get()).counter == 0
        await world.stop()

    run(main)


def test_a_device_set_up_again_with_a_clock_that_is_behind_heals_itself(world: World) -> None:
    """Its earlier life began at a right clock; now it is 1970, and each of its counters was used before."""

    async def main() -> None:
        agent = agent_with(world, JumpingClock(1.0))
        world.start(agent)
        await world.coordinator.publish(Release(1))
        update = await world.coordinator.updates.get()
        highest = update.counter + 1_700_000_000 * 2**20
        known = receipt_for(update, Verdict.REJECTED, Reason.REPLAYED_COUNTER)
        await world.coordinator.tell(msgspec.structs.replace(known, highest=highest))
        await world.coordinator.publish(Release(2))
        again = await world.coordinator.updates.get()
        assert again.counter == highest + 1
        await world.stop()

        # From here on it counts from there, whatever the clock says and however often it starts.
        world.start(agent_with(world, JumpingClock(1.0)))
        await world.coordinator.answer(await world.coordinator.updates.get())
        await world.coordinator.publish(Release(3))
        assert (await world.coordinator.updates.get()).counter > again.counter
        await world.stop()

    run(main)
