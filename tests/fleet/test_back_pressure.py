"""A fleet that comes back at one moment, and a device that never stops: nothing lost, nothing twice.

The broker's queue holds 50 messages, and drops what is beyond without a word; few are sent twice.
"""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from returning_devices import ReturningFleet
from whole_fleet import (
    Witness,
    assert_balanced,
    audited,
    coordinator_here,
    make_fleet,
    simulated,
    until,
)

from broker_config.local import LocalBroker, free_port
from broker_config.mosquitto import development
from fedtide.wire import topics
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.frame import PROTOCOL_VERSION
from fedtide.wire.ids import DeviceId, Epoch
from fedtide.wire.link import LinkDown, Session, Traffic
from fedtide.wire.messages import CoordinatorState, Reason, Verdict
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.seal import seal
from fedtide.wire.signatures import COORDINATOR_DOMAIN

pytestmark = pytest.mark.mosquitto

REPOSITORY = Path(__file__).parents[2]
QUEUED = 50
SECONDS_PER_UPDATE = 0.001
MOST_SENT_PER_UPDATE = 1.2


@pytest.fixture
def forgetful(tmp_path):
    """A mosquitto that queues 50 messages per session."""
    port, folder = free_port(), tmp_path / "broker"
    run_as = "root" if os.geteuid() == 0 else None
    text = development(port, state=folder / "state", run_as=run_as)
    assert text.count("max_queued_messages 20000") == 1
    config = text.replace("max_queued_messages 20000", f"max_queued_messages {QUEUED}")
    with LocalBroker(folder, "mosquitto", port, config) as broker:
        yield broker


async def say_that_the_coordinator_is_away(fleet):
    """Its last word, as it leaves it behind."""
    state = CoordinatorState(
        fleet=fleet.name,
        epoch=Epoch(0),
        online=False,
        protocol_min=PROTOCOL_VERSION,
        protocol_max=PROTOCOL_VERSION,
    )
    async with connected(fleet, "last-word") as connection:
        sealed = seal(state, fleet.directory.key(), COORDINATOR_DOMAIN)
        await connection.publish(topics.COORDINATOR.name(fleet.name), sealed, retain=True)


@contextlib.asynccontextmanager
async def connected(fleet, name):
    connection = await MqttDialler(fleet.broker, Traffic())(Session(name, True, 0, 32, None), 0)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def slow_coordinator(fleet):
    """A coordinator in its own process, whose journal takes a millisecond more per update."""
    program = Path(__file__).with_name("slow_coordinator.py")
    with (fleet.directory.path / "coordinator.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(program), str(SECONDS_PER_UPDATE)),
            *("coordinator", "run", "--dir", str(fleet.directory.path)),
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        )
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


def come_back(path, digits, broker, *, devices, updates, more="", deadline_s):
    """Devices wait for their coordinator; then it is there. How often updates were sent per update.

    Every update is receipted as applied and is in the journal once; the accounting adds up.
    """
    fleet = make_fleet(path, digits, broker.port, devices=0, goal=100_000, more=more)
    back = ReturningFleet.of(fleet, path, devices=devices, updates=updates)

    async def scenario():
        await say_that_the_coordinator_is_away(fleet)
        there = []
        async with back.running(there) as done:
            await until(lambda: len(there) == devices, deadline_s, lambda: f"{len(there)} are there")
            await asyncio.sleep(0.3)  # for the last one to hear that nobody listens
            assert back.sent == 0
            async with slow_coordinator(fleet):
                await asyncio.wait_for(done, deadline_s)

    asyncio.run(scenario())
    status, record = fleet.status(), audited(fleet)
    assert len(record.updates) == record.totals["applied"] == devices * updates
    assert {str(device.settings.device) for device in back.devices} == {name for name, _ in record.updates}
    assert sum(device.tally.applied + device.tally.duplicate for device in back.devices) == devices * updates
    assert sum(device.tally.rejected for device in back.devices) == 0
    assert_balanced(status.updates)
    assert status.updates.waiting == 0
    return back.sent / (devices * updates)


def test_a_hundred_and_fifty_devices_that_come_back_at_one_moment_send_their_update_once(
    digits, forgetful, tmp_path
):
    sent = come_back(tmp_path, digits, forgetful, devices=150, updates=1, deadline_s=60)
    assert sent <= MOST_SENT_PER_UPDATE


@pytest.mark.long
def test_twelve_hundred_devices_that_come_back_at_one_moment_send_their_update_once(
    digits, forgetful, tmp_path
):
    sent = come_back(tmp_path, digits, forgetful, devices=1200, updates=1, deadline_s=240)
    assert sent <= MOST_SENT_PER_UPDATE


@pytest.mark.long
def test_forty_devices_with_thirty_updates_each_send_them_once(digits, forgetful, tmp_path):
    sent = come_back(tmp_path, digits, forgetful, devices=40, updates=30, deadline_s=240)
    assert sent <= MOST_SENT_PER_UPDATE


@pytest.mark.long
def test_without_a_pace_the_queue_drops_updates_and_still_none_is_lost(digits, forgetful, tmp_path):
    """What the pace is for: the same return of everybody, where all are told that they may come at once."""
    more = "[pacing]\nat_once = 100000\n"
    sent = come_back(tmp_path, digits, forgetful, devices=1200, updates=1, more=more, deadline_s=240)
    assert sent > MOST_SENT_PER_UPDATE


FLOOD = "[share]\nmessages_per_s = 5.0\nburst_messages = 50\n"


def test_a_device_that_never_stops_is_dropped_and_the_others_are_served(digits, forgetful, tmp_path):
    """One sends a thousand valid updates as fast as it can, while three train and send."""
    fleet = make_fleet(tmp_path, digits, forgetful.port, devices=3, goal=3, more=FLOOD)
    back = ReturningFleet.of(fleet, tmp_path, devices=1, updates=1000)
    flooder = back.devices[0]
    name, witness = flooder.settings.device, Witness(fleet)

    async def scenario():
        async with coordinator_here(fleet) as (service, running), witness.listening():
            await until(lambda: service.status("").published_version == 0, 30, lambda: "no head")
            make = back.envelopes()
            messages = [
                update_chunks(make(name, flooder.key, counter), counter, MAX_CHUNK_BYTES)[0]
                for counter in range(1, 1001)
            ]
            async with connected(fleet, "flooder") as connection, simulated(fleet):
                topic = topics.UPDATE.name(fleet.name, shard=0, device=name)
                for start in range(0, len(messages), 20):
                    await asyncio.gather(
                        *(connection.publish(topic, message) for message in messages[start : start + 20])
                    )
                honest = {str(device.settings.device) for device in fleet.devices}
                applied = lambda: {device for device, _ in witness.applied()} & honest  # noqa: E731
                await until(lambda: applied() == honest, 30, lambda: f"only {applied()}")
                await until(
                    lambda: not service.committer.accounting.waiting, 30, lambda: "something still waits"
                )
            assert not running.done()
            return service.status("running").updates

    updates = asyncio.run(scenario())
    assert_balanced(updates)
    told = [receipt for receipt in witness.receipts if receipt.reason is Reason.TOO_MANY]
    assert {(receipt.device, receipt.verdict, receipt.retry_after_s) for receipt in told} == {
        (name, Verdict.REJECTED, 60.0)
    }
    assert len(told) <= 2
    dropped = updates.rejected["too-many"]
    record = audited(fleet)
    of_the_flooder = sum(device == name for device, _ in record.updates)
    assert of_the_flooder < 300 < dropped
    assert record.totals["rejected:too-many"] == dropped
    assert {receipt.counter for receipt in witness.receipts if receipt.device == name} - {0} <= set(
        range(1, 1001)
    )


def test_a_stranger_in_a_devices_place_makes_it_late_but_ends_none_of_its_updates(
    digits, forgetful, tmp_path
):
    """Without access rules anybody can publish there. Here somebody takes the whole share, every second anew;
    the next message that may be read comes 0.2 s later."""
    share = "[share]\nmessages_per_s = 5.0\nburst_messages = 20\n"
    fleet = make_fleet(tmp_path, digits, forgetful.port, devices=0, goal=1000, more=share)
    back = ReturningFleet.of(fleet, tmp_path, devices=1, updates=1, receipt_timeout_s=0.3)
    topic = topics.UPDATE.name(fleet.name, shard=0, device=DeviceId("back-0"))
    noise = np.random.default_rng(0).bytes(200)

    async def forge():
        async with connected(fleet, "forger") as connection:
            with contextlib.suppress(LinkDown):
                while True:
                    await asyncio.gather(*(connection.publish(topic, noise) for _ in range(30)))
                    await asyncio.sleep(1.0)

    async def scenario():
        async with coordinator_here(fleet) as (service, _running):
            await until(lambda: service.status("").published_version == 0, 30, lambda: "no head")
            forging = asyncio.create_task(forge())
            try:
                await until(
                    lambda: service.status("").updates.rejected.get("too-many", 0) > 10,
                    30,
                    lambda: "no flood",
                )
                async with back.running() as done:
                    await asyncio.wait_for(done, 60)
            finally:
                forging.cancel()
                await asyncio.gather(forging, return_exceptions=True)
            return service.status("running").updates

    updates = asyncio.run(scenario())
    assert_balanced(updates)
    assert updates.applied == 1
    assert back.devices[0].tally.rejected == 0
    assert [device for device, _ in audited(fleet).updates] == ["back-0"]
