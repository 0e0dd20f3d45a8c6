"""A simulated fleet trains to its target over real brokers, through a broker that forgets, and in numbers."""

import asyncio
import os
import signal

import pytest
from whole_fleet import (
    assert_balanced,
    audited,
    coordinator_here,
    make_fleet,
    simulated,
    until,
)

from broker_config.local import free_port, start_local_broker

STOP_AT_90 = "[stop]\nmetric = 0.9\nseconds = 150.0\n"


def test_eight_devices_train_to_ninety_percent(digits, brokers, tmp_path):
    fleet = make_fleet(tmp_path, digits, brokers.port, devices=8, more=STOP_AT_90)
    # At the usual step a payload of 1,210 parameters is some dozen bytes, beside 345 around it. A finer step
    # costs little there, and learns in a fraction of the updates.
    settings = fleet.directory.settings_file
    settings.write_text(
        settings.read_text().replace("[update]", "[update]\ncodec_parameters = { step = 2.0 }")
    )

    async def scenario():
        async with coordinator_here(fleet) as (service, running), simulated(fleet) as devices:
            await until(lambda: service.status("").connected, 20, lambda: service.status(""))
            mqtt_version = service.status("").mqtt_version
            reason = await running
            return mqtt_version, reason, service.status("stopped"), devices

    mqtt_version, reason, seen, devices = asyncio.run(scenario())
    assert reason == "metric reached 0.9"
    assert mqtt_version == {4: "3.1.1", 5: "5"}[brokers.mqtt_version]
    assert_balanced(seen.updates)
    assert seen.updates.rejected.keys() <= {"stopped"}
    assert sum(seen.staleness.values()) == seen.updates.applied

    record = audited(fleet)
    assert {device for device, _ in record.updates} == {device.settings.device for device in fleet.devices}
    assert len(record.updates) == seen.updates.applied
    # A payload of this model is some dozen bytes, and what is around it 345; events and presence come on top.
    uplink = sum(traffic.sent_bytes for traffic in devices.traffic.values())
    assert 350 * seen.updates.applied < uplink < 1000 * (seen.updates.received + 100)
    downlink = sum(traffic.received_bytes for traffic in devices.traffic.values())
    # Each update was trained on a model fetched for it; as float32 that alone would be 4 bytes a parameter.
    assert seen.keyframe_bytes < 2 * seen.parameters
    assert downlink < 4 * seen.parameters * seen.updates.received


def test_a_broker_that_restarts_empty_is_survived_without_a_person(digits, brokers, tmp_path):
    fleet = make_fleet(tmp_path, digits, brokers.port, devices=5, more="[stop]\nversions = 30\n")

    async def scenario():
        async with coordinator_here(fleet) as (service, running), simulated(fleet):
            await until(lambda: service.status("").version >= 8, 30, lambda: service.status(""))
            await asyncio.to_thread(brokers.kill)
            await asyncio.to_thread(brokers.restart, empty=True)
            before = service.status("").version
            async with asyncio.timeout(40):
                reason = await running
            return before, reason, service.status("stopped")

    before, reason, seen = asyncio.run(scenario())
    assert (before < 30, reason) == (True, "versions reached 30")
    assert_balanced(seen.updates)
    assert audited(fleet).version >= 30


@pytest.mark.mosquitto
def test_a_broker_that_restarts_with_yesterdays_memory_is_survived_too(digits, tmp_path):
    """It knows the coordinator's session and the head of then, but not the chunks of today's model."""
    port = free_port()
    state = tmp_path / "broker" / "state"
    config = f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\nmax_queued_messages 0\n"
    config += f"persistence true\npersistence_location {state}/\nautosave_interval 0\n"
    fleet = make_fleet(tmp_path, digits, port, devices=4, more="[stop]\nversions = 30\n")

    async def scenario(broker):
        async with coordinator_here(fleet) as (service, running), simulated(fleet):
            await until(lambda: service.status("").version >= 3, 30, lambda: service.status(""))
            os.kill(broker.pid, signal.SIGUSR1)  # mosquitto writes its sessions and retained messages
            await until((state / "mosquitto.db").exists, 10, broker.log_tail)
            saved = service.status("").version
            await until(lambda: service.status("").version >= saved + 8, 30, lambda: service.status(""))
            await asyncio.to_thread(broker.kill)
            await asyncio.to_thread(broker.start)
            async with asyncio.timeout(40):
                return await running

    with start_local_broker(tmp_path / "broker", "mosquitto", config, port) as broker:
        assert asyncio.run(scenario(broker)) == "versions reached 30"
    audited(fleet)


def test_two_hundred_devices_on_one_broker_are_all_served(digits, broker, tmp_path):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=200, goal=20, seconds_per_update=2.0)

    async def scenario():
        async with coordinator_here(fleet) as (service, _running), simulated(fleet) as devices:
            await until(
                lambda: all(any(tally.applied for tally in tallies) for tallies in devices.tallies.values()),
                90,
                lambda: service.status("").updates,
            )
            return service.status("running")

    seen = asyncio.run(scenario())
    assert len(seen.devices) == 200
    assert all(device.applied for device in seen.devices)
    assert seen.updates.rejected == {}
    assert_balanced(seen.updates)
