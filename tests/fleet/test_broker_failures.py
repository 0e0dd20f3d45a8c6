"""Real brokers that die, forget, fill their disk or drop what they acknowledged: no update is lost by it."""

import asyncio
import contextlib
import resource
import subprocess
from dataclasses import replace

import msgspec
import pytest
from device_ledger import LedgerFleet, assert_every_receipt_is_true
from mqtt_proxy import MqttProxy
from proxy_script import Script
from whole_fleet import Witness, coordinator_here, make_fleet, simulated, until

from broker_config.local import BrokerUnavailable, LocalBroker, free_port

PATIENCE_S = 60
DROPPED = "Outgoing messages are being dropped"  # the one trace that mosquitto leaves, once per client

pytestmark = pytest.mark.mosquitto


def mosquitto(path, more):
    port = free_port()
    config = f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\nmax_inflight_messages 32\n"
    config += f"set_tcp_nodelay true\npersistence_location {path / 'broker' / 'state'}/\n{more}"
    (path / "broker").mkdir()
    return LocalBroker(path / "broker", "mosquitto", port, config)


@contextlib.asynccontextmanager
async def fleet_at_work(fleet):
    async with (
        Witness(fleet).listening() as witness,
        coordinator_here(fleet) as (service, running),
        simulated(fleet, 0, LedgerFleet) as devices,
    ):
        yield service, witness, devices
        assert not running.done(), running


async def applied(service, more, patience_s=PATIENCE_S):
    before = service.status("").updates.applied
    await until(
        lambda: service.status("").updates.applied >= before + more,
        patience_s,
        lambda: service.status("").updates,
    )


@pytest.mark.parametrize(
    "memory",
    ["persistence false\n", "persistence true\nautosave_interval 1\n"],
    ids=["that-forgets", "with-a-memory"],
)
def test_a_broker_killed_again_and_again_loses_no_update(digits, tmp_path, memory):
    broker = mosquitto(tmp_path, memory)
    fleet = make_fleet(tmp_path, digits, broker.port, devices=5)

    async def scenario():
        async with fleet_at_work(fleet) as (service, witness, _):
            for _ in range(2):
                await applied(service, 10)
                await asyncio.to_thread(broker.kill)
                await asyncio.to_thread(broker.start)
            await applied(service, 10)
            return witness

    with broker:
        seen = assert_every_receipt_is_true(fleet, asyncio.run(scenario()))
    assert seen.updates.applied >= 30


@contextlib.contextmanager
def tiny_disk(folder, size):
    """A file system of its own for a folder; skips where mounting is not permitted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no small disk to fill")
    if mounted.returncode:
        pytest.skip(f"a small disk to fill cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_broker_whose_disk_is_full_goes_on_and_comes_back_empty_after_a_kill(digits, tmp_path):
    broker = mosquitto(tmp_path, "persistence true\nautosave_interval 1\n")
    state = tmp_path / "broker" / "state"
    fleet = make_fleet(tmp_path, digits, broker.port, devices=5)

    async def scenario():
        async with fleet_at_work(fleet) as (service, witness, _):
            await applied(service, 10)
            with contextlib.suppress(OSError), (state / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(1024))
            saw = broker.log_tail()
            await until(lambda: "No space left" in broker.log_path.read_text(), 20, lambda: saw)
            await applied(service, 10)  # it cannot save a thing, and goes on
            await asyncio.to_thread(broker.kill)
            await asyncio.to_thread(restarted, broker)
            await applied(service, 15)
            return witness

    with tiny_disk(state, "256k"), broker:
        assert_every_receipt_is_true(fleet, asyncio.run(scenario()))


def restarted(broker):
    """Start with the database as it is; one that cannot be read is thrown away, as its operator would."""
    try:
        broker.start()
    except BrokerUnavailable:
        broker.restart(empty=True)


def test_a_broker_that_dies_of_its_full_disk_loses_no_update(digits, tmp_path):
    broker = mosquitto(tmp_path, "persistence true\nautosave_interval 1\n")
    fleet = make_fleet(tmp_path, digits, broker.port, devices=5)

    async def scenario():
        async with fleet_at_work(fleet) as (service, witness, _):
            await applied(service, 10)
            resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (2048, 2048))
            await until(lambda: not broker.running, 20, broker.log_tail)  # SIGXFSZ while it saves
            await asyncio.to_thread(restarted, broker)
            await applied(service, 15)
            return witness

    with broker:
        assert_every_receipt_is_true(fleet, asyncio.run(scenario()))


@pytest.mark.parametrize(
    ("queue", "updates"), [(10, 120), pytest.param(50, 1200, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_a_broker_that_drops_what_it_acknowledged_loses_no_update(digits, tmp_path, queue, updates):
    """A fleet that answers each version at once, and a coordinator far away: 32 under way, more queue."""
    broker, coordinator_port = mosquitto(tmp_path, f"max_queued_messages {queue}\n"), free_port()
    fleet = make_fleet(
        tmp_path,
        digits,
        coordinator_port,
        devices=36 + 2 * queue,
        goal=20,
        seconds_per_update=0.0,
        devices_port=broker.port,
    )
    fleet.devices = [
        replace(device, settings=msgspec.structs.replace(device.settings, receipt_timeout_s=2.0))
        for device in fleet.devices
    ]

    async def scenario():
        far = Script(delay_s=0.15)
        async with (
            MqttProxy(coordinator_port, broker.port, far),
            fleet_at_work(fleet) as (service, witness, devices),
        ):
            await applied(service, updates, patience_s=PATIENCE_S + updates)
            assert sum(tally.resent for tallies in devices.tallies.values() for tally in tallies) >= 5
            return witness

    with broker:
        witness = asyncio.run(scenario())
        assert DROPPED in broker.log_path.read_text()
        assert_every_receipt_is_true(fleet, witness, all_devices=False)
