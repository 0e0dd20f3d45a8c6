"""A whole fleet through a broker and a network that do their worst: nothing is lost, nothing counts twice."""

import asyncio
import contextlib
from dataclasses import replace

import msgspec
import pytest
from device_ledger import LedgerFleet, assert_every_receipt_is_true
from mqtt_proxy import MqttProxy
from proxy_script import CALM, Cut, Script, Toward, Trouble, Unit
from whole_fleet import (
    Witness,
    coordinator_here,
    make_fleet,
    simulated,
    until,
)

from broker_config.local import free_port, start_local_broker

PATIENCE_S = 60
UPDATES = "fl/1/+/up/#"
DOWN = "fl/1/+/dn/#"
IN_CHUNKS = '[update]\ncodec = "float32"\nmissing_after_s = 0.3\n'
"""An update of this model is 5 kB then, which takes several chunks where packets are small."""


@pytest.fixture(scope="module")
def small_packets(tmp_path_factory):
    """A broker that announces packets of 2 kB, so that both sides send chunks of 1 kB."""
    port = free_port()
    config = f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\nmax_packet_size 2048\n"
    config += "max_queued_messages 20000\nmax_inflight_messages 32\nset_tcp_nodelay true\n"
    with start_local_broker(tmp_path_factory.mktemp("small-packets"), "mosquitto", config, port) as broker:
        yield broker


def _asking_soon(device):
    """A device that sends again sooner, so that a test need not wait for its patience."""
    return replace(device, settings=msgspec.structs.replace(device.settings, receipt_timeout_s=0.6))


class Storm:
    """A fleet whose devices and whose coordinator each have a proxy between them and the broker."""

    def __init__(self, path, digits, broker, *, devices=5, more="", seconds_per_update=0.05):
        self.broker = broker
        self.devices_port, self.coordinator_port = free_port(), free_port()
        self.fleet = make_fleet(
            path,
            digits,
            self.coordinator_port,
            devices=devices,
            seconds_per_update=seconds_per_update,
            more=more,
            devices_port=self.devices_port,
        )
        self.fleet.devices = [_asking_soon(device) for device in self.fleet.devices]
        if "[update]" in more:
            settings = self.fleet.directory.settings_file
            settings.write_text(settings.read_text().replace("[update]\nmissing_after_s = 1.0\n", "", 1))

    @contextlib.asynccontextmanager
    async def raging(self, for_devices, for_coordinator, seed):
        """The fleet, its proxies and its witness, running."""
        async with (
            MqttProxy(self.devices_port, self.broker.port, for_devices, seed) as devices_proxy,
            MqttProxy(self.coordinator_port, self.broker.port, for_coordinator, seed) as coordinator_proxy,
            Witness(self.fleet, self.broker.port).listening() as witness,
            coordinator_here(self.fleet) as (service, running),
            simulated(self.fleet, seed, LedgerFleet),
        ):
            yield devices_proxy, coordinator_proxy, witness, service
            assert not running.done(), running

    async def applied(self, service, many):
        before = service.status("").updates.applied
        await until(
            lambda: service.status("").updates.applied >= before + many,
            PATIENCE_S,
            lambda: service.status("").updates,
        )


def weathered(storm, for_devices, for_coordinator, *, updates, seed, reasons=frozenset()):
    """So many updates in the storm, and some more in the calm after it; what the proxies did."""

    async def scenario():
        async with storm.raging(for_devices, for_coordinator, seed) as (
            near_devices,
            near_coordinator,
            *rest,
        ):
            witness, service = rest
            await storm.applied(service, updates)
            near_devices.script = near_coordinator.script = CALM
            for proxy in (near_devices, near_coordinator):
                proxy.cut_all()  # so that fuses lit in the storm burn down with it
            await storm.applied(service, 5)
            return witness, near_devices.deeds, near_coordinator.deeds

    witness, near_devices, near_coordinator = asyncio.run(scenario())
    return assert_every_receipt_is_true(storm.fleet, witness, reasons), near_devices, near_coordinator


def both_ways(**trouble):
    return tuple(Trouble(toward, **trouble) for toward in Toward)


def in_disorder(digits, broker, path, *, updates, seed):
    storm = Storm(path, digits, broker, more=IN_CHUNKS)
    script = Script(0.005, 0.02, both_ways(duplicate=0.3, reorder=0.2, hold_s=0.1))
    seen, near_devices, near_coordinator = weathered(storm, script, script, updates=updates, seed=seed)
    assert near_devices.duplicated + near_coordinator.duplicated >= updates
    assert near_devices.reordered + near_coordinator.reordered >= updates
    assert seen.updates.duplicate > 0


@pytest.mark.mosquitto
def test_duplicated_reordered_and_late_messages_change_nothing(digits, small_packets, tmp_path):
    in_disorder(digits, small_packets, tmp_path, updates=40, seed=1)


def cut_in_the_middle(digits, broker, path, *, updates, seed):
    storm = Storm(path, digits, broker, more=IN_CHUNKS)
    after_a_chunk = Cut(Toward.BROKER, Unit.PUBLISHES, least=1, most=14, topics=UPDATES)
    anywhere = Cut(Toward.PEER, Unit.BYTES, least=200, most=20_000, share=0.5)
    coordinators = Cut(Toward.PEER, Unit.BYTES, least=5_000, most=120_000)
    _, near_devices, near_coordinator = weathered(
        storm,
        Script(cuts=(after_a_chunk, anywhere)),
        Script(cuts=(coordinators,)),
        updates=updates,
        seed=seed,
    )
    assert near_devices.cut >= updates / 4
    assert near_coordinator.cut >= 2


@pytest.mark.mosquitto
def test_devices_and_coordinator_cut_in_the_middle_of_updates_lose_none(digits, small_packets, tmp_path):
    cut_in_the_middle(digits, small_packets, tmp_path, updates=40, seed=2)


def lossy(digits, broker, path, *, updates, seed, more):
    storm = Storm(path, digits, broker, devices=6, more=more)
    lost_updates = Script(troubles=(Trouble(Toward.PEER, drop=0.2),))
    lost_receipts = Script(troubles=(Trouble(Toward.PEER, DOWN, drop=0.2),))
    seen, near_devices, near_coordinator = weathered(
        storm, lost_receipts, lost_updates, updates=updates, seed=seed
    )
    assert near_coordinator.dropped >= updates / 8
    assert near_devices.dropped >= 1
    assert seen.updates.duplicate >= 1  # applied, and the receipt was lost


@pytest.mark.mosquitto
def test_a_broker_that_loses_a_fifth_of_what_it_acknowledged_loses_no_update(digits, small_packets, tmp_path):
    lossy(digits, small_packets, tmp_path, updates=40, seed=3, more=IN_CHUNKS)


def corrupted(digits, broker, path, *, updates, seed):
    storm = Storm(path, digits, broker, devices=6)
    # What the coordinator retains on the broker is left whole: bytes that are stored damaged are the same for
    # everybody, and only the next head puts them right.
    for_devices = Script(troubles=both_ways(corrupt=0.1))
    answers = Trouble(Toward.BROKER, DOWN, corrupt=0.1)
    for_coordinator = Script(troubles=(answers, Trouble(Toward.PEER, corrupt=0.1)))
    reasons = {"malformed", "wrong-device", "bad-signature", "unsupported-version", "too-large"}
    seen, near_devices, near_coordinator = weathered(
        storm, for_devices, for_coordinator, updates=updates, seed=seed, reasons=reasons
    )
    assert near_devices.corrupted + near_coordinator.corrupted >= updates / 4
    assert sum(seen.updates.rejected.values()) >= 1


def test_flipped_bits_are_found_and_lose_no_update(digits, broker, tmp_path):
    corrupted(digits, broker, tmp_path, updates=40, seed=4)


def test_a_broker_that_stands_still_for_seconds_is_waited_for(digits, broker, tmp_path):
    storm = Storm(tmp_path, digits, broker)

    async def scenario():
        async with storm.raging(CALM, CALM, 5) as (near_devices, near_coordinator, witness, service):
            await storm.applied(service, 10)
            near_coordinator.freeze()
            before, sent = service.status("").updates.applied, near_devices.deeds.published
            # The broker takes updates and the coordinator hears nothing: each device sends its own again.
            await until(
                lambda: near_devices.deeds.published >= sent + 20, PATIENCE_S, lambda: near_devices.deeds
            )
            near_devices.freeze()
            assert service.status("").updates.applied <= before + len(storm.fleet.devices)
            near_coordinator.thaw()
            await storm.applied(service, 1)
            near_devices.thaw()
            await storm.applied(service, 30)
            return witness

    seen = assert_every_receipt_is_true(storm.fleet, asyncio.run(scenario()))
    assert seen.updates.duplicate >= 1


@pytest.mark.long
@pytest.mark.mosquitto
@pytest.mark.parametrize("seed", range(10, 16))
@pytest.mark.parametrize("storm", [in_disorder, cut_in_the_middle, corrupted])
def test_long_storms_lose_nothing(digits, small_packets, tmp_path, storm, seed):
    storm(digits, small_packets, tmp_path, updates=300, seed=seed)


@pytest.mark.long
@pytest.mark.mosquitto
@pytest.mark.parametrize("more", ["", IN_CHUNKS], ids=["one-message", "chunks"])
def test_a_lossy_broker_loses_nothing_for_a_long_time(digits, small_packets, tmp_path, more):
    lossy(digits, small_packets, tmp_path, updates=300, seed=20, more=more)
