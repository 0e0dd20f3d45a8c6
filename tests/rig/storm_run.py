"""A storm: a whole fleet comes at one moment, one update from each device, to a real broker and coordinator.

The plan is never run, and payloads are drawn at random; everything else is what a fleet sends.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from light_devices import LightRecord, LightUpdate, Place
from light_fleet import LightFleet
from small_fleet import PLAN

from broker_config.local import LocalBroker, start_local_broker
from coordinator import status
from coordinator.plan.file import BuiltPlan, save
from coordinator.recovery import recover
from coordinator.status import Status
from fedtide.fleet_directory import FleetDirectory, NewFleet, create
from fedtide.wire import codecs, topics
from fedtide.wire.envelope import UpdateHeader, seal_update
from fedtide.wire.ids import Counter, DeviceId, FleetId
from fedtide.wire.link import Broker, Session, Traffic
from fedtide.wire.messages import Head
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.parameters import Schema, TensorSpec
from fedtide.wire.plan import Plan
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import HEAD_DOMAIN, SigningKey

FLEET: Final = FleetId("storm")
CODEC: Final = "q8"
PARAMETERS: Final = 19_600
"""So many that an update has 20 kB: a byte each in q8, its scales, the envelope around them."""
PAYLOADS: Final = 16
"""Distinct ones; what differs between all updates is header and signature."""
_POLL_S: Final = 0.02
_DEADLINE_S: Final = 60.0

_SETTINGS: Final = """\
fleet = "{fleet}"
plan = "model.plan"
broker.hosts = ["127.0.0.1:{port}"]
publish.min_interval_s = {head_every_s}
aggregator = {{ kind = "fedbuff", goal = {goal} }}
{more}
"""


class StormFailed(Exception):
    """The fleet did not get so far; the text says how far."""


def storm_plan() -> BuiltPlan:
    """The hand-made plan with more parameters."""
    schema = Schema(tensors=(TensorSpec(name="p.weight", dtype="float32", shape=(PARAMETERS,)),))
    manifest = msgspec.structs.replace(PLAN.plan.manifest, schema=schema)
    return BuiltPlan(Plan(manifest, b"", b""), np.zeros(PARAMETERS, np.float32))


def device_key(device: DeviceId) -> SigningKey:
    """The device's key, by its name."""
    return SigningKey.from_seed(hashlib.sha256(device.encode()).digest())


def device_names(count: int) -> Iterator[DeviceId]:
    """The first ``count`` devices."""
    return (DeviceId(f"device-{number:05}") for number in range(count))


def signed_updates(names: Iterator[DeviceId], head: Head) -> Iterator[LightUpdate]:
    """One update of each device, trained on the version that ``head`` offers."""
    plan = storm_plan()
    schema, rng = plan.plan.manifest.schema, np.random.default_rng(0)
    deltas = rng.normal(0.0, 1e-3, (PAYLOADS, PARAMETERS)).astype(np.float32)
    payloads = [codecs.get(CODEC).encode(delta, schema) for delta in deltas]
    digests = [hashlib.sha256(payload).digest() for payload in payloads]
    for number, device in enumerate(names):
        payload = payloads[number % PAYLOADS]
        header = UpdateHeader(
            fleet=FLEET,
            plan=plan.plan.id,
            device=device,
            counter=Counter(1),
            base_version=head.version,
            base_sha256=head.parameters_sha256,
            codec=CODEC,
            num_examples=100,
            local_steps=4,
            payload_bytes=len(payload),
            payload_sha256=digests[number % PAYLOADS],
        )
        envelope = seal_update(header, payload, device_key(device))
        yield LightUpdate.of(envelope, device, Counter(1))


@dataclass
class StormFleet:
    """A fleet's directory with its devices enrolled, its broker, and its coordinator's process.

    Attributes:
        directory: the coordinator's.
        broker: mosquitto, with the limits that are shipped.
        log: what the coordinator wrote to standard error, JSON lines, over all its starts.
        coordinator: its process.
    """

    directory: FleetDirectory
    broker: LocalBroker
    log: Path
    coordinator: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The coordinator's process id."""
        assert self.coordinator is not None, "the coordinator was not started"
        return self.coordinator.pid

    async def start(self) -> None:
        """Start the coordinator and wait until it is connected.

        Raises:
            StormFailed: it is not, in time.
        """
        begun = self._events("link.up")
        arguments = ("-m", "fedtide", "coordinator", "run", "--json-logs", "--dir", str(self.directory.path))
        with self.log.open("ab") as output:
            self.coordinator = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        deadline = time.monotonic() + _DEADLINE_S
        while self._events("link.up") == begun:
            if self.coordinator.returncode is not None or time.monotonic() > deadline:
                raise StormFailed(f"the coordinator did not connect: {self.log.read_text()[-2000:]}")
            await asyncio.sleep(_POLL_S)

    async def kill(self) -> None:
        """End the coordinator as a crash would."""
        assert self.coordinator is not None, "the coordinator was not started"
        self.coordinator.kill()
        await self.coordinator.wait()

    def status(self) -> Status:
        """As last written."""
        return status.read(self.directory.status_file)

    async def head(self) -> Head:
        """What the coordinator offers."""
        dial = MqttDialler(Broker(hosts=(f"127.0.0.1:{self.broker.port}",)), Traffic())
        session = Session("storm-head", clean_start=True, expiry_s=0, receive_maximum=4, will=None)
        connection = await dial(session, 0)
        await connection.subscribe([topics.HEAD.name(FLEET)])
        async for delivery in connection.deliveries():
            await connection.close()
            return unseal(delivery.payload, Head, self.directory.key().public, HEAD_DOMAIN)
        raise StormFailed("the connection ended before a head came")

    async def settled(self, received: int) -> Status:
        """The first status that counts so many updates and has none waiting.

        Raises:
            StormFailed: none does in time.
        """
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            found = self.status()
            if found.updates.received >= received and found.updates.waiting == 0:
                return found
            if time.monotonic() > deadline:
                raise StormFailed(f"not {received} updates received and judged: {found.updates}")
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """End the coordinator and wait for it.

        Raises:
            StormFailed: it did not end well.
        """
        assert self.coordinator is not None, "the coordinator was not started"
        self.coordinator.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_DEADLINE_S):
            if await self.coordinator.wait():
                raise StormFailed(f"the coordinator ended badly: {self.log.read_text()[-2000:]}")

    def _events(self, event: str) -> int:
        return sum(line.get("event") == event for line in log_lines(self.log))

    def applied(self) -> dict[DeviceId, int]:
        """How many updates of each device were applied, as the stopped coordinator's journal says."""
        recovered = recover(self.directory.state, self.directory.settings(), storm_plan())
        try:
            return {device: mark.applied for device, mark in recovered.journal.marks().items()}
        finally:
            recovered.close()


@contextlib.asynccontextmanager
async def storm_fleet(
    place: Path, devices: int, *, goal: int = 100, head_every_s: float = 1.0, more: str = ""
) -> AsyncIterator[StormFleet]:
    """Make the directory, enrol the devices, start broker and coordinator; end both on leaving.

    Args:
        place: an empty directory on a real disk.
        devices: how many are enrolled.
        goal: updates per model version.
        head_every_s: at least so long between two heads; every device gets every head.
        more: lines of ``coordinator.toml``.

    Raises:
        StormFailed: the coordinator did not connect.
    """
    with start_local_broker(place / "broker", "mosquitto") as broker:
        directory, _ = create(place / "fleet", NewFleet(FLEET, f"127.0.0.1:{broker.port}"))
        settings = _SETTINGS.format(
            fleet=FLEET, port=broker.port, goal=goal, head_every_s=head_every_s, more=more
        )
        directory.settings_file.write_text(settings)
        save(storm_plan(), directory.path / "model.plan")
        for device in device_names(devices):
            (directory.roster / f"{device}.pub").write_text(f"{device_key(device).public}\n")
        fleet = StormFleet(directory, broker, place / "coordinator.log")
        try:
            await fleet.start()
            yield fleet
        finally:
            if fleet.coordinator is not None and fleet.coordinator.returncode is None:
                await fleet.stop()


def log_lines(log: Path) -> Iterator[dict[str, object]]:
    """What a process logged, as far as its lines are whole."""
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


@dataclass(frozen=True)
class Storm:
    """What the devices saw.

    Attributes:
        record: of every device.
        verdicts: how many updates met which verdict, or were rejected for which reason.
        seconds: from the first device's start to the last receipt.
        connecting_s: from the first device's start until the last had its subscriptions.
    """

    record: LightRecord
    verdicts: Tally[str]
    seconds: float
    connecting_s: float


async def storm(
    fleet: StormFleet,
    updates: Sequence[LightUpdate],
    *,
    within_s: float,
    deadline_s: float,
    receipt_timeout_s: float = 10.0,
    in_its_middle: Callable[[], Awaitable[None]] | None = None,
) -> Storm:
    """Let the devices loose, and wait until each has its receipt.

    Args:
        fleet: who hears them.
        updates: one per device.
        within_s: all devices connect within this.
        deadline_s: seconds for all of it.
        receipt_timeout_s: a device's first wait for its receipt.
        in_its_middle: done once half of the devices have theirs.

    Raises:
        StormFailed: some have no receipt by then.
        WireError, ValueError: a receipt is not the device's, or not the coordinator's.
    """
    place = Place(fleet.broker.port, FLEET, fleet.directory.key().public, receipt_timeout_s)
    light = LightFleet(place, updates, np.random.default_rng(0))
    record = light.record

    async def interrupt() -> None:
        while 2 * len(record.receipts) < len(updates):  # noqa: ASYNC110 - no event is worth it here
            await asyncio.sleep(_POLL_S)
        if in_its_middle is not None:
            await in_its_middle()

    try:
        async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as group:
            group.create_task(interrupt())
            began = await light.run(within_s)
    except TimeoutError:
        raise StormFailed(
            f"{len(record.receipts):,} of {len(updates):,} devices have a receipt after {deadline_s:g} s, "
            f"{len(record.connected):,} connected, {record.sent:,} updates were sent; the coordinator: "
            f"{fleet.status().updates}"
        ) from None
    finally:
        light.leave()
    last, connected = max(record.receipted.values()), max(record.connected.values())
    return Storm(record, light.verdicts(), last - began, connected - began)
