"""The same agent and coordinator over real brokers: what the broker in memory takes for granted holds."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from agent_world import (
    DEVICE_KEY,
    FLEET,
    Release,
    ScriptedCoordinator,
    agent_settings,
    run,
    until,
    workbench,
)

from broker_config.local import LocalBroker
from edge_agent.agent import Agent, Tally
from fedtide.wire import frame, topics
from fedtide.wire.link import Broker, Connection, Session, Traffic
from fedtide.wire.messages import Presence
from fedtide.wire.mqtt import MqttDialler

_runs: Final = itertools.count()


class Coordinator:
    """A scripted coordinator on a real connection.

    Attributes:
        presences: what the device said about itself.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.script = ScriptedCoordinator(self._publish)
        self.presences: list[Presence] = []

    async def listen(self) -> None:
        async for delivery in self._connection.deliveries():
            self._connection.acknowledge(delivery)
            if topics.PRESENCE.parse(delivery.topic):
                self.presences.append(frame.from_frame(delivery.payload, Presence))
            else:
                self.script.take(delivery.topic, delivery.payload)

    async def _publish(self, topic: str, payload: bytes, retain: bool) -> None:  # noqa: FBT001
        await self._connection.publish(topic, payload, retain=retain)


def settings_of(broker: LocalBroker) -> Broker:
    return Broker(hosts=(f"{broker.host}:{broker.port}",), reconnect_min_s=0.01, reconnect_max_s=0.05)


@asynccontextmanager
async def coordinator_on(broker: LocalBroker) -> AsyncIterator[Coordinator]:
    session = Session(
        f"coordinator-{next(_runs)}", clean_start=True, expiry_s=0, receive_maximum=32, will=None
    )
    connection = await MqttDialler(settings_of(broker), Traffic())(session, 0)
    coordinator = Coordinator(connection)
    listening = asyncio.create_task(coordinator.listen())
    await connection.subscribe([topics.UPDATE.filter(FLEET), topics.PRESENCE.filter(FLEET)])
    try:
        yield coordinator
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await connection.close()


def agent_on(broker: LocalBroker, state: Path) -> Agent:
    dial = MqttDialler(settings_of(broker), Traffic())
    return Agent(agent_settings(state, receipt_timeout_s=1.0), DEVICE_KEY, workbench(dial))


@asynccontextmanager
async def living(agent: Agent) -> AsyncIterator[None]:
    task = asyncio.create_task(agent.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_updates_receipts_and_new_versions_go_their_way(brokers: LocalBroker, tmp_path: Path) -> None:
    async def main() -> None:
        async with coordinator_on(brokers) as coordinator:
            script = coordinator.script
            await script.announce()
            await script.publish(Release(1))
            agent = agent_on(brokers, tmp_path)
            async with living(agent):
                for version in (1, 2, 3):
                    update = await script.updates.get()
                    update.envelope.verify(DEVICE_KEY.public)
                    assert update.envelope.header.base_version == version
                    assert update.delta.tolist() == [1, 1, 1]
                    await script.publish(Release(version + 1))
                    await script.answer(update)
                await script.updates.get()
                assert agent.tally == Tally(trained=4, sent=4, applied=3)
            await until(lambda: [each.online for each in coordinator.presences][-2:] == [True, False])

    run(main)


def test_a_device_that_vanishes_is_reported_by_its_will(brokers: LocalBroker, tmp_path: Path) -> None:
    async def main() -> None:
        async with coordinator_on(brokers) as coordinator:
            agent = agent_on(brokers, tmp_path)
            async with living(agent):
                await until(lambda: any(each.online for each in coordinator.presences))
                online = coordinator.presences[-1]
                agent.cut()
                offline = Presence(online=False, boot=online.boot)
                await until(lambda: offline in coordinator.presences)

    run(main)
