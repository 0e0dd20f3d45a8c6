"""Sensors on real brokers: what Zigbee2MQTT, Tasmota and Home Assistant publish ends up in the ring."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from agent_world import DEVICE_KEY, Release, World, agent_settings, tiny_plan, workbench

from broker_config.local import LocalBroker
from edge_agent.agent import Agent
from edge_agent.data_sources import Sensor
from edge_agent.readings import Channel
from edge_agent.sensor_listener import Listening, SensorListener
from edge_agent.window_ring import read_ring
from fedtide.assembly import CachedExamples
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.link import Broker, Connection, Session, Traffic
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.plan import Plan

_names: Final = itertools.count()
DEADLINE_S: Final = 15.0


def settings_of(broker: LocalBroker) -> Broker:
    return Broker(hosts=(f"{broker.host}:{broker.port}",), reconnect_min_s=0.01, reconnect_max_s=0.05)


def run(main: Callable[[], Any]) -> None:
    async def within_the_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await main()

    asyncio.run(within_the_deadline())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is code that has no event
        await asyncio.sleep(0.005)


@asynccontextmanager
async def sensors_on(broker: LocalBroker) -> AsyncIterator[Connection]:
    """A connection that publishes as sensors do."""
    session = Session(f"sensors-{next(_names)}", clean_start=True, expiry_s=0, receive_maximum=8, will=None)
    connection = await MqttDialler(settings_of(broker), Traffic())(session, 0)
    try:
        yield connection
    finally:
        await connection.close()


def listener_to(source: Sensor, broker: LocalBroker) -> SensorListener:
    settings = settings_of(broker)
    listening = Listening(
        sampling=source.sampling,
        broker=settings,
        client_id=f"listener-{next(_names)}",
        ring=source.path,
        layout=source.layout,
        max_bytes=source.max_bytes,
        flush_s=source.flush_s,
    )
    dial = MqttDialler(settings, Traffic())
    return SensorListener(listening, dial, np.random.default_rng(1), UNSYNCED_DISK)


@asynccontextmanager
async def listening_to(source: Sensor, broker: LocalBroker) -> AsyncIterator[SensorListener]:
    listener = listener_to(source, broker)
    task = asyncio.create_task(listener.run())
    try:
        yield listener
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def windows_of(source: Sensor) -> list[list[list[float]]]:
    kept = read_ring(source.path, source.layout).windows
    found: list[list[list[float]]] = kept.reshape(-1, source.window, len(source.channels)).tolist()
    return found


async def listens(caplog: pytest.LogCaptureFixture, times: int = 1) -> None:
    await until(lambda: [record.message for record in caplog.records].count("Listening to sensors") >= times)


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_zigbee2mqtts_json_becomes_windows(
    brokers: LocalBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    channels = tuple(
        Channel(topic="zigbee2mqtt/kitchen", field=field) for field in ("temperature", "humidity", "contact")
    )
    source = Sensor(path=tmp_path / "ring", channels=channels, window=2, flush_s=0.02)

    async def main() -> None:
        async with sensors_on(brokers) as sensors, listening_to(source, brokers):
            await listens(caplog)
            for temperature in (20.5, 21.0, 21.5, 22.0, 22.5):
                payload = b'{"battery":97,"temperature":%g,"humidity":50,"contact":true}' % temperature
                await sensors.publish("zigbee2mqtt/kitchen", payload, qos=0)
            await until(lambda: len(windows_of(source)) == 2)

    run(main)
    assert windows_of(source) == [[[20.5, 50, 1], [21, 50, 1]], [[21.5, 50, 1], [22, 50, 1]]]


def test_tasmotas_nested_json_becomes_windows_whatever_else_arrives(
    brokers: LocalBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    channels = (Channel(topic="tele/+/SENSOR", field="ENERGY.Power"),)
    source = Sensor(path=tmp_path / "ring", channels=channels, window=2, flush_s=0.02)
    bad = [
        b"",
        b"{",
        b"\xff" * 100,
        b'{"ENERGY":{}}',
        b'{"ENERGY":{"Power":"NaN"}}',
        b'{"ENERGY":[1]}',
        b"9" * 100_000,
        b"[" * 1000,
    ]

    async def main() -> None:
        async with sensors_on(brokers) as sensors, listening_to(source, brokers):
            await listens(caplog)
            for payload in bad:
                await sensors.publish("tele/plug/SENSOR", payload)
            for watts in (12, 13, 14, 15):
                payload = b'{"Time":"2024-01-05T10:00:00","ENERGY":{"Power":%d,"Today":0.1}}' % watts
                await sensors.publish("tele/plug/SENSOR", payload)
                await sensors.publish("tele/plug/STATE", payload)
            await until(lambda: len(windows_of(source)) == 2)

    run(main)
    assert windows_of(source) == [[[12], [13]], [[14], [15]]]
    told = [record.message for record in caplog.records if getattr(record, "event", "") == "sensor.skipped"]
    assert len(told) == 1  # the first bad one; the next line comes with the tenth
    assert told[0].startswith("Skipped 1 readings: 1 payload that is not JSON (first: tele/plug/SENSOR ")


def test_home_assistants_plain_states_are_sampled_and_held(
    brokers: LocalBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    channels = (
        Channel(topic="homeassistant/sensor/attic/state"),
        Channel(topic="homeassistant/binary_sensor/pump/state"),
    )
    source = Sensor(path=tmp_path / "ring", channels=channels, window=3, every_s=0.02, flush_s=0.02)

    async def main() -> None:
        async with sensors_on(brokers) as sensors:
            # States are retained: the listener comes later and hears them all the same.
            await sensors.publish("homeassistant/sensor/attic/state", b"21.5", retain=True)
            await sensors.publish("homeassistant/binary_sensor/pump/state", b"on", retain=True)
            async with listening_to(source, brokers):
                await until(lambda: [[21.5, 1]] * 3 in windows_of(source))
                await sensors.publish("homeassistant/sensor/attic/state", b"unavailable")
                await sensors.publish("homeassistant/binary_sensor/pump/state", b"off")
                await until(lambda: [[21.5, 0]] * 3 in windows_of(source))

    run(main)
    assert {value for window in windows_of(source) for row in window for value in row} == {21.5, 1, 0}


def test_it_goes_on_after_the_broker_was_away(
    tmp_path: Path, broker: LocalBroker, caplog: pytest.LogCaptureFixture
) -> None:
    source = Sensor(path=tmp_path / "ring", channels=(Channel(topic="t"),), window=1, flush_s=0.02)

    async def main() -> None:
        async with listening_to(source, broker):
            await listens(caplog)
            await asyncio.to_thread(broker.restart)
            await listens(caplog, times=2)
            async with sensors_on(broker) as sensors:
                await sensors.publish("t", b"5")
                await until(lambda: windows_of(source) == [[[5]]])

    run(main)


def test_what_is_not_yet_on_disk_is_written_at_the_end(
    tmp_path: Path, broker: LocalBroker, caplog: pytest.LogCaptureFixture
) -> None:
    source = Sensor(path=tmp_path / "ring", channels=(Channel(topic="t"),), window=1, flush_s=1000.0)

    async def main() -> None:
        async with sensors_on(broker) as sensors, listening_to(source, broker) as listener:
            await listens(caplog)
            await sensors.publish("t", b"5")
            await sensors.publish("t", b"6")
            await until(lambda: len(listener._waiting) == 2)
            assert windows_of(source) == []

    run(main)
    assert windows_of(source) == [[[5]], [[6]]]


def test_a_disk_that_takes_nothing_costs_windows_and_not_the_agent(
    tmp_path: Path, broker: LocalBroker, caplog: pytest.LogCaptureFixture
) -> None:
    source = Sensor(path=tmp_path / "ring", channels=(Channel(topic="t"),), window=1, flush_s=0.02)
    source.path.write_text("a file where the folder should be")

    def lost() -> bool:
        return any(getattr(record, "event", "") == "sensor.not_written" for record in caplog.records)

    async def main() -> None:
        async with sensors_on(broker) as sensors, listening_to(source, broker):
            await listens(caplog)
            await sensors.publish("t", b"5")
            await until(lost)
            source.path.unlink()
            await sensors.publish("t", b"6")
            await until(lambda: source.path.is_dir() and windows_of(source) == [[[6]]])

    run(main)


def test_an_agent_waits_for_its_sensors_and_trains_on_what_they_say(
    tmp_path: Path, broker: LocalBroker, caplog: pytest.LogCaptureFixture
) -> None:
    source = Sensor(
        path=tmp_path / "ring", channels=(Channel(topic="t"),), window=2, flush_s=0.02, min_examples=3
    )
    labelled = tiny_plan()
    plan = Plan(msgspec.structs.replace(labelled.manifest, targets=None), labelled.train, labelled.evaluation)

    async def main() -> None:
        world = World.new(tmp_path)
        listener = listener_to(source, broker)
        settings = msgspec.structs.replace(agent_settings(tmp_path), data=source)
        bench = workbench(world.broker.dial, world.trainer)
        bench = replace(bench, examples=CachedExamples(source), beside=listener.run)
        world.start(Agent(settings, DEVICE_KEY, bench))
        await world.coordinator.publish(Release(1, plan=plan))
        await until(lambda: "Waiting: there are 0 of the 3 examples needed to train" in caplog.messages)
        await listener.connected.wait()
        async with sensors_on(broker) as sensors:
            for value in range(7):
                await sensors.publish("t", b"%d" % value)
        update = await world.coordinator.updates.get()
        assert update.envelope.header.num_examples == 3
        await world.stop()

    run(main)
