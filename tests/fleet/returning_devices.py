"""Devices that have updates to send and nothing else to do: outbox, mailbox and sender of the real agent.

They do not train, so that a thousand of them fit one process; what they send and when is decided by the code
that decides it on a device.
"""

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coordinator.plan.file import load
from edge_agent.data_sources import Npz
from edge_agent.fetch import Fetcher
from edge_agent.mailbox import Mailbox
from edge_agent.sender import Sender, Tally
from edge_agent.settings import AgentSettings
from edge_agent.submission import Submission
from fedtide.wire import codecs
from fedtide.wire.clock import SYSTEM_CLOCK
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.envelope import UpdateHeader, seal_update
from fedtide.wire.ids import DeviceId
from fedtide.wire.link import Broker, Traffic
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.parameters import fingerprint
from fedtide.wire.signatures import PublicKey


@dataclass
class ReturningDevice:
    """One device and its updates.

    Attributes:
        settings: as its ``agent.toml`` would say.
        key: its private key.
        updates: how many it has to send, one after the other.
        tally: what became of them.
        rested_s: what its receipts asked it to rest.
        seconds: how long each update took from its first attempt to its receipt, its turn included.
    """

    settings: AgentSettings
    key: object
    updates: int
    tally: Tally = field(default_factory=Tally)
    rested_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class ReturningFleet:
    """All of them.

    Attributes:
        fleet: whose directory they are enrolled in.
        devices: they.
    """

    fleet: object
    devices: list[ReturningDevice] = field(default_factory=list)

    @classmethod
    def of(cls, fleet, path, *, devices, updates, receipt_timeout_s=10.0):
        """Enrol so many devices with so many updates each; versions are published to the bit."""
        text = fleet.directory.settings_file.read_text()
        fleet.directory.settings_file.write_text(text.replace("[publish]", '[publish]\nformat = "float32"'))
        made = [_device(fleet, path, number, updates, receipt_timeout_s) for number in range(devices)]
        return cls(fleet, made)

    @contextlib.asynccontextmanager
    async def running(self, connected=None):
        """All devices at work; what it gives ends when every outbox is empty.

        ``connected``: a list to which each adds its name when it has a connection.
        """
        make = self.envelopes()
        tasks = [
            asyncio.create_task(_live(device, make, number, connected if connected is not None else []))
            for number, device in enumerate(self.devices)
        ]
        try:
            yield asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def envelopes(self):
        """Makes a signed update on version 0, of a device with a key, under a counter."""
        return _envelopes(self.fleet)

    @property
    def sent(self):
        """Attempts to send an update, over all devices."""
        return sum(device.tally.sent for device in self.devices)


def _device(fleet, path, number, updates, receipt_timeout_s):
    name = DeviceId(f"back-{number}")
    settings = AgentSettings(
        fleet=fleet.name,
        device=name,
        coordinator_key=str(fleet.key),
        key=Path("unused"),
        state=path / "back" / name,
        data=Npz(path=Path("unused")),
        broker=Broker(hosts=(f"127.0.0.1:{fleet.port}",), reconnect_min_s=0.1, reconnect_max_s=2.0),
        receipt_timeout_s=receipt_timeout_s,
    )
    return ReturningDevice(settings, fleet.enrol(name), updates)


def _envelopes(fleet):
    """All have the same delta; that is no concern of anybody here."""
    plan = load(fleet.settings().plan)
    schema, base = plan.plan.manifest.schema, fingerprint(plan.initial)
    payload = codecs.get("float32").encode(np.full(schema.size, 1e-6, np.float32), schema)

    def make(device, key, counter):
        header = UpdateHeader(
            fleet=fleet.name,
            plan=plan.plan.id,
            device=device,
            counter=counter,
            base_version=0,
            base_sha256=base,
            codec="float32",
            num_examples=1,
            local_steps=1,
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).digest(),
        )
        return seal_update(header, payload, key)

    return make


async def _live(device, make, number, connected):
    settings, rng = device.settings, np.random.default_rng(number)
    submission = Submission(settings, device.key, SYSTEM_CLOCK.wall, UNSYNCED_DISK)
    mailbox = Mailbox(
        settings,
        coordinator=PublicKey.parse(settings.coordinator_key),
        public=device.key.public,
        fetcher=Fetcher(settings.fleet, 1000),
        dial=MqttDialler(settings.broker, Traffic()),
        rng=rng,
        clock=SYSTEM_CLOCK,
    )
    sender = Sender(settings, submission, mailbox, rng, device.tally)
    listening = asyncio.create_task(mailbox.run())
    try:
        await mailbox.connected()
        connected.append(settings.device)
        for _ in range(device.updates):
            counter = submission.outbox.reserve()
            began = SYSTEM_CLOCK.now()
            pending = submission.outbox.put(counter, make(settings.device, device.key, counter))
            rest_s = await sender.deliver(pending)
            device.seconds.append(SYSTEM_CLOCK.now() - began)
            device.rested_s.append(rest_s)
            await asyncio.sleep(rest_s)
        assert len(submission.outbox) == 0
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await mailbox.say_goodbye()
