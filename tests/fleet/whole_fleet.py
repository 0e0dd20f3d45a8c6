"""A whole fleet for a test: a directory, simulated devices, a coordinator here or in its own process."""

import asyncio
import contextlib
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import msgspec
import numpy as np

from coordinator import status
from coordinator.accounting import APPLIED
from coordinator.journal import History
from coordinator.model_state import initial_state
from coordinator.plan.file import load
from coordinator.recovery import base_parameters, recover
from coordinator.replay import replay
from coordinator.settings import CoordinatorSettings, Rules
from edge_agent.data_sources import Npz
from edge_agent.dataset import Dataset
from edge_agent.settings import AgentSettings
from edge_agent.simulation import SimulatedDevice, SimulatedFleet
from fedtide.coordination import open_coordinator
from fedtide.fleet_directory import FleetDirectory, NewFleet, create
from fedtide.wire import topics
from fedtide.wire.errors import WireError
from fedtide.wire.ids import DeviceId, FleetId
from fedtide.wire.link import Broker, LinkDown, Reconnector, Session, Traffic
from fedtide.wire.messages import DownMessage, Receipt, Verdict
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.parameters import fingerprint
from fedtide.wire.seal import unseal_any
from fedtide.wire.signatures import DOWN_DOMAIN, PublicKey, SigningKey

_NUMBERS = count()

SETTINGS = """
fleet = "{fleet}"
plan = "model.plan"
flush_after_s = 2.0
[broker]
hosts = ["127.0.0.1:{port}"]
reconnect_min_s = 0.05
reconnect_max_s = 0.5
[aggregator]
kind = "fedbuff"
goal = {goal}
[publish]
min_interval_s = 0.05
keep_versions = 100000
[update]
missing_after_s = 1.0
[evaluation]
data = "held-out.npz"
every_versions = 2
{more}
"""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 8×8, and a plan to learn them."""

    plan: Path
    train: Dataset
    held_out: Dataset


def make_digits(plan, inputs, targets):
    order = np.random.default_rng(0).permutation(len(inputs))
    inputs, targets = inputs[order].astype(np.float32), targets[order].astype(np.int64)
    split = len(inputs) * 4 // 5
    return Digits(
        plan,
        Dataset((inputs[:split],), targets[:split]),
        Dataset((inputs[split:],), targets[split:]),
    )


@dataclass
class WholeFleet:
    """A fleet's directory and its devices.

    Attributes:
        name: of its own, so that tests which share a broker do not share a fleet.
        directory: the coordinator's.
        key: the coordinator's public key.
        port: where devices find the broker.
        devices: enrolled simulated devices.
    """

    name: FleetId
    directory: FleetDirectory
    key: PublicKey
    port: int
    devices: list[SimulatedDevice] = field(default_factory=list)

    @property
    def broker(self):
        return Broker(hosts=(f"127.0.0.1:{self.port}",), reconnect_min_s=0.05, reconnect_max_s=0.5)

    def settings(self) -> CoordinatorSettings:
        return self.directory.settings()

    def enrol(self, device):
        """A new key, whose public half is in the roster."""
        key = SigningKey.generate()
        (self.directory.roster / f"{device}.pub").write_text(f"{key.public}\n")
        return key

    def add_device(self, device, dataset, seconds_per_update, state):
        settings = AgentSettings(
            fleet=self.name,
            device=DeviceId(device),
            coordinator_key=str(self.key),
            key=Path("unused"),
            state=state,
            data=Npz(path=Path("unused")),
            broker=self.broker,
            receipt_timeout_s=2.0,
        )
        self.devices.append(SimulatedDevice(settings, self.enrol(device), dataset, seconds_per_update))

    def status(self):
        return status.read(self.directory.status_file)


def make_fleet(path, digits, port, *, devices, goal=3, seconds_per_update=0.05, more="", devices_port=None):
    """A fleet whose devices share the training examples; ``more`` is added to ``coordinator.toml``.

    Devices find the broker on ``devices_port``, if that is another than the coordinator's.
    """
    name = FleetId(f"digits-{next(_NUMBERS)}")
    directory, key = create(path / "fleet", NewFleet(fleet=name, broker=f"127.0.0.1:{port}"))
    directory.settings_file.write_text(SETTINGS.format(fleet=name, port=port, goal=goal, more=more))
    (directory.path / "model.plan").write_bytes(digits.plan.read_bytes())
    np.savez(directory.path / "held-out.npz", x=digits.held_out.inputs[0], y=digits.held_out.targets)
    fleet = WholeFleet(name, directory, key, port if devices_port is None else devices_port)
    for number in range(devices):
        part = digits.train.rows(np.arange(number, len(digits.train), devices))
        fleet.add_device(f"device-{number}", part, seconds_per_update, path / "devices" / str(number))
    return fleet


@contextlib.asynccontextmanager
async def simulated(fleet, seed=0, kind=SimulatedFleet):
    """The fleet's devices, running."""
    devices = kind(fleet.devices, seed)
    running = asyncio.create_task(devices.run())
    try:
        yield devices
    finally:
        running.cancel()
        (ended,) = await asyncio.gather(running, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), f"the devices ended by themselves: {ended!r}"


@contextlib.asynccontextmanager
async def coordinator_here(fleet):
    """A coordinator in this process: the service and the task that runs it."""
    service, recovered = open_coordinator(fleet.directory, fleet.settings(), Traffic())
    running = asyncio.create_task(service.run())
    try:
        yield service, running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        recovered.close()


async def start_coordinator(fleet):
    """A coordinator in its own process, which writes its log to the fleet's directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (fleet.directory.path / "coordinator.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedtide", "coordinator", "run", "--dir", str(fleet.directory.path)),
            stderr=log,
            env=environment,
        )


async def until(condition, deadline_s, what):
    """Look every 20 ms: what brokers and other processes do cannot be awaited."""
    try:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {deadline_s:g} s: {what()}") from None


@dataclass
class Witness:
    """Hears every receipt the coordinator sends, whoever it is for, over all connections.

    Attributes:
        fleet: whose receipts.
        port: the broker's; None: where the devices find it.
        receipts: those signed by the coordinator, in order.
        unsigned: messages on receipt topics that were not.
    """

    fleet: WholeFleet
    port: int | None = None
    receipts: list[Receipt] = field(default_factory=list)
    unsigned: int = 0

    def applied(self):
        """Each update that some receipt called applied."""
        return {
            (receipt.device, receipt.counter)
            for receipt in self.receipts
            if receipt.verdict is Verdict.APPLIED
        }

    @contextlib.asynccontextmanager
    async def listening(self):
        subscribed = asyncio.Event()
        task = asyncio.create_task(self._listen(subscribed))
        await subscribed.wait()
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _listen(self, subscribed):
        broker = self.fleet.broker
        if self.port is not None:
            broker = msgspec.structs.replace(broker, hosts=(f"127.0.0.1:{self.port}",))
        dial = MqttDialler(broker, Traffic())
        reconnector = Reconnector(dial, broker, np.random.default_rng(0), lambda *_: None)
        while True:
            connection = await reconnector.connect(Session("witness", True, 0, 32, None))
            try:
                await connection.subscribe([topics.DOWN.filter(self.fleet.name)])
                subscribed.set()
                async for delivery in connection.deliveries():
                    connection.acknowledge(delivery)
                    self._take(delivery.payload)
            except LinkDown:
                await reconnector.pause()
            finally:
                connection.abort()

    def _take(self, payload):
        try:
            message = unseal_any(payload, DownMessage, self.fleet.key, DOWN_DOMAIN)
        except WireError:
            self.unsigned += 1
            return
        if isinstance(message, Receipt):
            self.receipts.append(message)


@dataclass(frozen=True)
class Record:
    """What a fleet's directory says happened.

    Attributes:
        updates: device and counter of each journaled update, in order.
        totals: fates by name.
        published: fingerprints by version.
        version: the newest.
    """

    updates: list
    totals: dict
    published: dict
    version: int


def audited(fleet):
    """The record of a fleet whose coordinator has ended, after everything in it was held against the rest."""
    settings, plan = fleet.settings(), load(fleet.settings().plan)
    recovered = recover(fleet.directory.state, settings, plan)
    try:
        journal, schema = recovered.journal, plan.plan.manifest.schema
        updates = [
            (entry.device, entry.counter)
            for _, entry in journal.entries_after(0)
            if type(entry).__name__ == "UpdateEntry"
        ]
        rows = journal.published()
        published = {row.version: row.fingerprint for row in rows}
        aggregated = {row.version: row.exact or row.fingerprint for row in rows}
        rules = Rules(aggregator=settings.aggregator, server_optimizer=settings.server_optimizer)
        replayed = {0: fingerprint(plan.initial)}
        _, state = replay(
            journal,
            initial_state(plan.initial, rules),
            0,
            schema=schema,
            bases=base_parameters(recovered.models, plan),
            on_version=lambda made: replayed.update({made.version: fingerprint(made.parameters)}),
        )
        totals, marks = journal.totals(), journal.marks()
        assert fingerprint(state.parameters) == fingerprint(recovered.state.parameters)
        assert {version: replayed[version] for version in aggregated} == aggregated
        for version, expected in published.items():
            if version > 0:
                assert fingerprint(recovered.models.parameters(version)) == expected
        assert len(set(updates)) == len(updates) == totals.get("applied", 0)
        assert {device: mark.applied for device, mark in marks.items() if mark.applied} == dict(
            Counter(device for device, _ in updates)
        )
        return Record(updates, totals, published, state.version)
    finally:
        recovered.close()


def applied_in_journal(fleet):
    """How many updates another process finds in the journal right now."""
    return History(fleet.directory.state / "journal").totals().get(APPLIED, 0)


def assert_balanced(updates):
    fates = updates.applied + updates.duplicate + sum(updates.rejected.values()) + updates.waiting
    assert updates.received == fates
