"""What a device tells: the newest of each kind, at most every five seconds, and no trouble twice."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from agent_world import DEVICE, FLEET, run, until

from edge_agent.mailbox import Mailbox
from edge_agent.reports import Reports
from edge_agent.troubles import trouble
from fedtide.wire import frame
from fedtide.wire.ids import ModelVersion
from fedtide.wire.link import Connection, LinkDown
from fedtide.wire.messages import DeviceEvent, EvaluationEvent, TrainingEvent, Trouble


@dataclass
class Listener:
    """A mailbox and its connection: it hears what is published, at the clock's time."""

    now: float = 100.0
    heard: list[tuple[float, frame.Message]] = field(default_factory=list)
    online: asyncio.Event = field(default_factory=asyncio.Event)
    losing: int = 0

    async def connected(self) -> Connection:
        await self.online.wait()
        return cast("Connection", self)

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        assert (topic, qos, retain) == ("fl/1/pumps/ev/pump-7", 0, False)
        if self.losing:
            self.losing -= 1
            raise LinkDown("lost")
        self.heard.append((self.now, frame.from_frame_any(payload, DeviceEvent)))

    async def pass_time(self, seconds: float) -> None:
        """Everyone does what there is to do, then time passes, then again."""
        for step in (0.0, seconds):
            self.now += step
            for _ in range(10):
                await asyncio.sleep(0)


@pytest.fixture
def listener() -> Listener:
    return Listener()


def reports_to(listener: Listener) -> Reports:
    return Reports(FLEET, DEVICE, cast("Mailbox", listener), lambda: listener.now)


def trained(version: int) -> TrainingEvent:
    return TrainingEvent(version=ModelVersion(version), num_examples=1, steps=1, seconds=0.1, loss=0.5)


def evaluated(version: int) -> EvaluationEvent:
    return EvaluationEvent(version=ModelVersion(version), num_examples=1, loss=0.5)


def failed(detail: str) -> Trouble:
    return trouble("data.unusable", ValueError(detail), ModelVersion(1))


def test_of_each_kind_the_newest_is_told_and_at_most_every_five_seconds(listener: Listener) -> None:
    async def main() -> None:
        listener.online.set()
        reports = reports_to(listener)
        running = asyncio.create_task(reports.run())
        await listener.pass_time(0.0)
        for version in (1, 2, 3):
            reports.tell(trained(version))
            reports.tell(evaluated(version))
            await listener.pass_time(1.0)
        # At once: version 1 of both kinds. Versions 2 and 3 wait for second 105; 3 takes the place of 2.
        assert [event.version for _, event in listener.heard] == [1, 1]
        await listener.pass_time(2.0)  # second 105
        reports.tell(evaluated(4))  # wakes it; it comes in the place of 3
        await listener.pass_time(0.0)
        later = {type(event).__name__: event.version for _, event in listener.heard[2:]}
        assert later == {"TrainingEvent": 3, "EvaluationEvent": 4}
        running.cancel()

    run(main)


def test_what_waits_is_told_when_its_time_comes_although_nothing_else_does(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        listener.online.set()
        reports = Reports(FLEET, DEVICE, cast("Mailbox", listener))  # with the real clock
        monkeypatch.setattr("edge_agent.reports._EVERY_S", 0.01)
        running = asyncio.create_task(reports.run())
        reports.tell(evaluated(1))
        await asyncio.sleep(0)
        reports.tell(evaluated(2))
        await until(lambda: len(listener.heard) == 2)
        assert listener.heard[1][1] == evaluated(2)
        running.cancel()

    run(main)


def test_without_a_connection_the_newest_waits(listener: Listener) -> None:
    async def main() -> None:
        reports = reports_to(listener)
        running = asyncio.create_task(reports.run())
        for version in range(1, 9):
            reports.tell(trained(version))
            await listener.pass_time(60.0)
        listener.online.set()
        await listener.pass_time(0.0)
        assert [event for _, event in listener.heard] == [trained(8)]
        running.cancel()

    run(main)


def test_a_report_that_is_lost_is_lost_and_the_next_one_comes(listener: Listener) -> None:
    async def main() -> None:
        listener.losing = 1
        listener.online.set()
        reports = reports_to(listener)
        running = asyncio.create_task(reports.run())
        reports.tell(trained(1))
        await listener.pass_time(6.0)
        reports.tell(trained(2))
        await listener.pass_time(0.0)
        assert [event for _, event in listener.heard] == [trained(2)]
        running.cancel()

    run(main)


def test_the_same_trouble_is_told_once_in_five_minutes(listener: Listener) -> None:
    async def main() -> None:
        listener.online.set()
        reports = reports_to(listener)
        running = asyncio.create_task(reports.run())
        for _ in range(40):  # every 15 s: 600 s
            reports.tell_trouble(failed("no such file"))
            await listener.pass_time(15.0)
        assert [moment for moment, _ in listener.heard] == [100.0, 400.0]
        reports.tell_trouble(failed("empty"))
        await listener.pass_time(0.0)
        assert listener.heard[-1][1] == failed("empty")
        running.cancel()

    run(main)


def test_trouble_that_ended_before_it_was_told_is_not_told_and_comes_again_if_it_does(
    listener: Listener,
) -> None:
    async def main() -> None:
        reports = reports_to(listener)
        running = asyncio.create_task(reports.run())
        reports.tell_trouble(failed("no such file"))
        reports.tell(trained(1))
        listener.online.set()
        await listener.pass_time(6.0)
        assert [event for _, event in listener.heard] == [trained(1)]
        reports.tell(trained(2))
        reports.tell_trouble(failed("no such file"))  # later than the training, which would end it
        await listener.pass_time(6.0)
        assert [event for _, event in listener.heard] == [trained(1), failed("no such file")]
        running.cancel()

    run(main)


def test_the_text_of_trouble_is_cut() -> None:
    assert len(failed("x" * 10_000).detail) == 200


def test_damage_is_told_first_and_again_if_the_connection_is_lost_and_training_does_not_end_it(
    listener: Listener,
) -> None:
    async def main() -> None:
        reports = reports_to(listener)
        reports.tell_of_damage([Path("/state/outbox/7.update"), Path("/state/outbox/counter")])
        reports.tell(trained(1))
        listener.losing = 3
        running = asyncio.create_task(reports.run())
        await listener.pass_time(0.0)
        listener.online.set()
        await listener.pass_time(10.0)
        damage, training = (event for _, event in listener.heard)
        assert isinstance(damage, Trouble)
        assert damage.event == "outbox.damaged"
        assert damage.detail == (
            "damaged on disk: 7.update, counter in /state/outbox; if this comes again, replace the disk"
        )
        assert training == trained(1)
        await listener.pass_time(1000.0)
        assert len(listener.heard) == 2
        running.cancel()

    run(main)


def test_without_damage_nothing_is_told_of_it(listener: Listener) -> None:
    async def main() -> None:
        listener.online.set()
        reports = reports_to(listener)
        reports.tell_of_damage([])
        running = asyncio.create_task(reports.run())
        await listener.pass_time(1000.0)
        assert listener.heard == []
        running.cancel()

    run(main)
