"""Overload: ten times what is sustained, for minutes; and one device that never stops among two hundred.

    python benchmarks/overload.py [--seconds 300] [--flood 1000]

One run has three parts, each against a real mosquitto and a coordinator in a process of its own; updates are
signed and have 20 kB.

    flood     200 devices send an update every four seconds, without and with one more that publishes a
              thousand messages a second. Latency: from an honest device's send to its receipt. What the flood
              costs the coordinator's processor is measured beside it: where the processor is busy with other
              things, a flood that it cannot even discard fills the broker's queue, and all wait in that.
    pace      what the coordinator sustains when its journal takes 40 ms more per update: 200 devices, each of
              which sends the next update at the receipt of the last.
    overload  ten times that, for --seconds: every device publishes on, whatever it hears. Resident memory is
              that of the coordinator; afterwards every receipt is held against the journal.

The journal is slowed down so that ten times its pace still leaves the machine to the coordinator.
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "rig"), str(ROOT / "tests" / "coordinator")]

from small_fleet import device_key  # noqa: E402 - the tests' hand-made plan and devices
from storm_run import CODEC, FLEET, PARAMETERS, device_names, storm_plan  # noqa: E402

from benchmarks.report import Target, cpu_seconds, print_report  # noqa: E402
from broker_config.local import LocalBroker, start_local_broker  # noqa: E402
from coordinator import status  # noqa: E402
from coordinator.entries import UpdateEntry  # noqa: E402
from coordinator.plan.file import save  # noqa: E402
from coordinator.recovery import recover  # noqa: E402
from coordinator.status import Updates  # noqa: E402
from fedtide.fleet_directory import FleetDirectory, NewFleet, create  # noqa: E402
from fedtide.wire import codecs, topics  # noqa: E402
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks  # noqa: E402
from fedtide.wire.envelope import UpdateHeader, seal_update  # noqa: E402
from fedtide.wire.errors import WireError  # noqa: E402
from fedtide.wire.ids import Counter, DeviceId  # noqa: E402
from fedtide.wire.link import Broker, Connection, LinkDown, PublishRefused, Session, Traffic  # noqa: E402
from fedtide.wire.messages import DownMessage, Head, Reason, Receipt, Verdict  # noqa: E402
from fedtide.wire.mqtt import MqttDialler  # noqa: E402
from fedtide.wire.seal import unseal, unseal_any  # noqa: E402
from fedtide.wire.signatures import DOWN_DOMAIN, HEAD_DOMAIN, PublicKey, SigningKey  # noqa: E402

DEVICES = 200
EVERY_S = 4.0
SLOWER_S = 0.040
TIMES = 10.0
CALIBRATION_S = 10.0
RESEND_S = 10.0
FLOOD_MESSAGES = 500
MOST_UNDER_WAY = 32
MB = 1e6
SETTINGS = """\
fleet = "{fleet}"
plan = "model.plan"
broker.hosts = ["127.0.0.1:{port}"]
aggregator = {{ kind = "fedbuff", goal = 1000000 }}
"""


@dataclass
class Peer:
    """A device as far as updates and receipts go: no pace, no rest, no outbox.

    Attributes:
        name: its id.
        key: its private key.
        coordinator: the coordinator's public key.
        receipts: what it was told of each counter, the first word.
        told_too_many: how often it was told that it sends too much.
    """

    name: DeviceId
    key: SigningKey
    coordinator: PublicKey
    head: Head
    receipts: dict[int, Receipt] = field(default_factory=dict)
    told_too_many: int = 0
    _connection: Connection | None = None
    _waiting: dict[int, asyncio.Future[Receipt]] = field(default_factory=dict)
    _counter: int = 0

    async def connect(self, port: int) -> None:
        """Connect and listen."""
        dial = MqttDialler(Broker(hosts=(f"127.0.0.1:{port}",)), Traffic())
        self._connection = await dial(Session(f"peer-{self.name}", True, 0, 32, None), 0)
        await self._connection.subscribe([topics.DOWN.name(FLEET, device=self.name)])

    async def listen(self) -> None:
        """Take receipts until the connection is closed."""
        assert self._connection is not None
        with contextlib.suppress(LinkDown):
            async for delivery in self._connection.deliveries():
                self._connection.acknowledge(delivery)
                with contextlib.suppress(WireError):
                    self._take(unseal_any(delivery.payload, DownMessage, self.coordinator, DOWN_DOMAIN))

    async def close(self) -> None:
        """Leave."""
        if self._connection is not None:
            await self._connection.close()

    def update(self, payload: bytes) -> tuple[int, bytes]:
        """The next update: its counter and its one message."""
        self._counter += 1
        header = UpdateHeader(
            fleet=FLEET,
            plan=self.head.plan,
            device=self.name,
            counter=Counter(self._counter),
            base_version=self.head.version,
            base_sha256=self.head.parameters_sha256,
            codec=CODEC,
            num_examples=100,
            local_steps=4,
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).digest(),
        )
        envelope = seal_update(header, payload, self.key)
        (message,) = update_chunks(envelope, header.counter, MAX_CHUNK_BYTES)
        return self._counter, message

    def updates(self, payload: bytes) -> Iterator[bytes]:
        """One after the other, without end."""
        while True:
            yield self.update(payload)[1]

    async def publish(self, message: bytes) -> None:
        """Publish on its topic."""
        assert self._connection is not None
        await self._connection.publish(topics.UPDATE.name(FLEET, shard=0, device=self.name), message)

    async def receipt_of(self, payload: bytes) -> float:
        """Send an update until its receipt comes; seconds that it took."""
        counter, message = self.update(payload)
        began = time.monotonic()
        self._waiting[counter] = asyncio.get_running_loop().create_future()
        while counter not in self.receipts:
            await self.publish(message)
            await asyncio.wait([self._waiting[counter]], timeout=RESEND_S)
        del self._waiting[counter]
        return time.monotonic() - began

    def _take(self, message: object) -> None:
        if not isinstance(message, Receipt):
            return
        if message.reason is Reason.TOO_MANY:
            self.told_too_many += 1
            return
        self.receipts.setdefault(message.counter, message)
        waiting = self._waiting.get(message.counter)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)


@dataclass(frozen=True)
class Fleet:
    """A fleet's directory, its broker, and its coordinator's process."""

    directory: FleetDirectory
    broker: LocalBroker
    coordinator: Process

    async def stop(self) -> Updates:
        """End the coordinator; the accounting it leaves."""
        self.coordinator.terminate()
        await self.coordinator.wait()
        return status.read(self.directory.status_file).updates


@contextlib.asynccontextmanager
async def started(place: Path, *program: str) -> AsyncIterator[Fleet]:
    """A coordinator and its broker; ``program``: what runs the coordinator instead of ``-m fedtide``."""
    with start_local_broker(place / "broker", "mosquitto") as broker:
        directory, _ = create(place / "fleet", NewFleet(FLEET, f"127.0.0.1:{broker.port}"))
        directory.settings_file.write_text(SETTINGS.format(fleet=FLEET, port=broker.port))
        save(storm_plan(), directory.path / "model.plan")
        for device in device_names(DEVICES + 1):
            (directory.roster / f"{device}.pub").write_text(f"{device_key(device).public}\n")
        with (place / "coordinator.log").open("wb") as log:
            coordinator = await asyncio.create_subprocess_exec(
                *(sys.executable, *(program or ("-m", "fedtide"))),
                *("coordinator", "run", "--dir", str(directory.path)),
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )
        try:
            yield Fleet(directory, broker, coordinator)
        finally:
            if coordinator.returncode is None:
                coordinator.terminate()
                await coordinator.wait()


async def offered_head(port: int, key: PublicKey) -> Head:
    """What devices are offered, once they are offered anything."""
    dial = MqttDialler(Broker(hosts=(f"127.0.0.1:{port}",)), Traffic())
    connection = await dial(Session("head", True, 0, 4, None), 0)
    await connection.subscribe([topics.HEAD.name(FLEET)])
    delivery = await anext(connection.deliveries())
    await connection.close()
    return unseal(delivery.payload, Head, key, HEAD_DOMAIN)


@contextlib.asynccontextmanager
async def peers(port: int, key: PublicKey, names: Iterable[DeviceId]) -> AsyncIterator[list[Peer]]:
    """Devices, connected. ``key``: the coordinator's."""
    head = await offered_head(port, key)
    made = [Peer(name, device_key(name), key, head) for name in names]
    for peer in made:
        await peer.connect(port)
    listening = [asyncio.create_task(peer.listen()) for peer in made]
    try:
        yield made
    finally:
        await asyncio.gather(*(peer.close() for peer in made))
        await asyncio.gather(*listening)


async def honest_latencies(devices: Sequence[Peer], payload: bytes, seconds: float) -> list[float]:
    """Seconds from send to receipt, of devices that send every four seconds, at moments of their own."""
    rng, latencies = np.random.default_rng(0), list[float]()
    end = time.monotonic() + seconds

    async def live(peer: Peer, offset_s: float) -> None:
        await asyncio.sleep(offset_s)
        while time.monotonic() < end:
            took_s = await peer.receipt_of(payload)
            latencies.append(took_s)
            await asyncio.sleep(max(0.0, EVERY_S - took_s))

    await asyncio.gather(*(live(peer, float(rng.uniform(0.0, EVERY_S))) for peer in devices))
    return latencies


async def publish_at(
    publish: Callable[[bytes], Coroutine[None, None, None]],
    messages: Iterator[bytes],
    per_s: float,
    end: float,
) -> int:
    """Publish messages at a rate until the end, whatever is heard; how many were."""
    published, began = 0, time.monotonic()
    under_way: set[asyncio.Task[None]] = set()
    while (now := time.monotonic()) < end:
        due = int((now - began) * per_s) + 1 - published
        for message in islice(messages, max(0, min(due, MOST_UNDER_WAY - len(under_way)))):
            task = asyncio.create_task(publish(message))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            published += 1
        await asyncio.sleep(max(0.005, 0.5 / per_s))
    for task in under_way:
        task.cancel()
    for ended in await asyncio.gather(*under_way, return_exceptions=True):
        if isinstance(ended, Exception) and not isinstance(ended, LinkDown | PublishRefused):
            raise ended
    return published


async def publish_without_end(port: int, key: PublicKey, seconds: float, per_s: float) -> None:
    """The flooding device, in a process of its own: valid updates, signed beforehand. Prints what it did."""
    name = list(device_names(DEVICES + 1))[-1]
    payload = update_payload()
    async with peers(port, key, [name]) as (flooder,):
        messages = cycle([flooder.update(payload)[1] for _ in range(FLOOD_MESSAGES)])
        print("ready", flush=True)
        published = await publish_at(flooder.publish, messages, per_s, time.monotonic() + seconds)
        print(published / seconds, flooder.told_too_many, flush=True)


@dataclass(frozen=True)
class Flood:
    """What honest devices had to wait for, and what the other one did.

    Attributes:
        before: seconds from send to receipt, without the flood.
        during: with it.
        published_per_s: by the flooding device.
        told: how often it was told to stop.
        cpu_s: of the coordinator, without and with the flood.
        updates: the accounting at the end.
    """

    before: list[float]
    during: list[float]
    published_per_s: float
    told: int
    cpu_s: tuple[float, float]
    updates: Updates


async def flood(place: Path, seconds: float, per_s: float) -> Flood:
    """The first part."""
    payload = update_payload()
    async with started(place) as fleet:
        port, key = fleet.broker.port, fleet.directory.key().public
        async with peers(port, key, device_names(DEVICES)) as honest:
            await honest_latencies(honest, payload, EVERY_S)  # all that happens only once has happened
            used = [cpu_seconds(fleet.coordinator.pid)]
            before = await honest_latencies(honest, payload, seconds)
            used.append(cpu_seconds(fleet.coordinator.pid))
            flooder = await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, "--flooder"),
                *map(str, (port, key, seconds + 2 * EVERY_S, per_s)),
                stdout=PIPE,
            )
            assert flooder.stdout is not None
            await flooder.stdout.readline()
            await asyncio.sleep(EVERY_S / 2)
            used.append(cpu_seconds(fleet.coordinator.pid))
            during = await honest_latencies(honest, payload, seconds)
            used.append(cpu_seconds(fleet.coordinator.pid))
            published_per_s, told = (await flooder.stdout.readline()).split()
            await flooder.wait()
        cpu_s = (used[1] - used[0], used[3] - used[2])
        return Flood(before, during, float(published_per_s), int(told), cpu_s, await fleet.stop())


def resident_mb(pid: int) -> float:
    """Resident memory now: Linux's VmRSS."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / MB
    raise ProcessLookupError(pid)


async def sustained(devices: Sequence[Peer], payload: bytes) -> float:
    """Updates a second when every device sends the next update at the receipt of the last."""
    end = time.monotonic() + CALIBRATION_S

    async def live(peer: Peer) -> int:
        done = 0
        while time.monotonic() < end:
            await peer.receipt_of(payload)
            done += 1
        return done

    began = time.monotonic()
    done = sum(await asyncio.gather(*(live(peer) for peer in devices)))
    return done / (time.monotonic() - began)


@dataclass(frozen=True)
class Overload:
    """What ten times the pace came to.

    Attributes:
        sustained_per_s: the pace.
        offered_per_s: what was published.
        memory_mb: of the coordinator, once a second.
        applied_receipts: how many updates devices were told are applied.
        broken_promises: those among them that are not in the journal exactly once.
        updates: the accounting at the end.
    """

    sustained_per_s: float
    offered_per_s: float
    memory_mb: list[float]
    applied_receipts: int
    broken_promises: int
    updates: Updates


async def overload(place: Path, seconds: float) -> Overload:
    """The second and the third part."""
    payload = update_payload()
    slow = ROOT / "tests" / "fleet" / "slow_coordinator.py"
    async with started(place, str(slow), str(SLOWER_S)) as fleet:
        key = fleet.directory.key().public
        async with peers(fleet.broker.port, key, device_names(DEVICES)) as devices:
            pace = await sustained(devices, payload)
            end = time.monotonic() + seconds
            each = TIMES * pace / len(devices)
            publishing = asyncio.gather(
                *(publish_at(peer.publish, peer.updates(payload), each, end) for peer in devices)
            )
            memory = []
            while not publishing.done():
                memory.append(resident_mb(fleet.coordinator.pid))
                await asyncio.wait([publishing], timeout=1.0)
            published = sum(publishing.result())
            await asyncio.sleep(RESEND_S)  # what the broker still has is judged
        updates = await fleet.stop()
        told = {
            (peer.name, counter)
            for peer in devices
            for counter, receipt in peer.receipts.items()
            if receipt.verdict is Verdict.APPLIED
        }
        in_journal = _applied(fleet)
        broken = sum(in_journal[update] != 1 for update in told)
        return Overload(pace, published / seconds, memory, len(told), broken, updates)


def _applied(fleet: Fleet) -> Tally[tuple[DeviceId, int]]:
    """How often each update is in the stopped coordinator's journal."""
    recovered = recover(fleet.directory.state, fleet.directory.settings(), storm_plan())
    try:
        entries = (entry for _, entry in recovered.journal.entries_after(0))
        return Tally((entry.device, entry.counter) for entry in entries if isinstance(entry, UpdateEntry))
    finally:
        recovered.close()


def p99(latencies: Sequence[float]) -> float:
    """The 99th percentile in milliseconds."""
    return 1000 * float(np.percentile(latencies, 99))


def unbalanced(updates: Updates) -> int:
    """By how many the accounting is off."""
    fates = updates.applied + updates.duplicate + sum(updates.rejected.values()) + updates.waiting
    return abs(updates.received - fates)


def grown(memory_mb: Sequence[float]) -> float:
    """The median of the last quarter over that of the second: the first is the way to where it stays."""
    quarter = max(1, len(memory_mb) // 4)
    return statistics.median(memory_mb[-quarter:]) / statistics.median(memory_mb[quarter : 2 * quarter])


def update_payload() -> bytes:
    """What every update here holds: 20 kB."""
    delta = np.random.default_rng(0).normal(0.0, 1e-3, PARAMETERS).astype(np.float32)
    return codecs.get(CODEC).encode(delta, storm_plan().plan.manifest.schema)


async def measure(place: Path, seconds: float, flood_per_s: float) -> None:
    """All parts, and the report."""
    flooded = await flood(place / "flood", min(seconds, 60.0), flood_per_s)
    loaded = await overload(place / "overload", seconds)
    before, during = p99(flooded.before), p99(flooded.during)
    print_report(
        "ten times what is sustained changes neither the coordinator's memory nor what it promised, and one "
        "device that never stops does not hold up the others",
        [
            Target("memory in the last quarter over the second", grown(loaded.memory_mb), 1.05),
            Target("receipts that are not in the journal exactly once", loaded.broken_promises, 0),
            Target("honest p99 latency, with the flood over without", during / before, 2.0),
            Target(
                "offered over sustained", loaded.offered_per_s / loaded.sustained_per_s, 9.0, at_most=False
            ),
            Target("accounting off by", unbalanced(flooded.updates) + unbalanced(loaded.updates), 0),
        ],
        devices=DEVICES,
        seconds=seconds,
        honest_p50_ms=[1000 * statistics.median(part) for part in (flooded.before, flooded.during)],
        honest_p99_ms=[before, during],
        honest_updates=[len(flooded.before), len(flooded.during)],
        flood_published_per_s=flooded.published_per_s,
        coordinator_cpu_s_in_the_same_time=list(flooded.cpu_s),
        flooder_told=flooded.told,
        flood_rejected=flooded.updates.rejected,
        sustained_per_s=loaded.sustained_per_s,
        offered_per_s=loaded.offered_per_s,
        receipts_applied=loaded.applied_receipts,
        memory_mb=[loaded.memory_mb[0], max(loaded.memory_mb), loaded.memory_mb[-1]],
        overload_applied=loaded.updates.applied,
        overload_received=loaded.updates.received,
        overload_rejected=loaded.updates.rejected,
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload; the claim is of 300")
    parser.add_argument("--flood", type=float, default=1000.0, help="messages a second of the one device")
    parser.add_argument("--flooder", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flooder:
        port, key, seconds, per_s = options.flooder
        asyncio.run(publish_without_end(int(port), PublicKey.parse(key), float(seconds), float(per_s)))
        return
    with tempfile.TemporaryDirectory(prefix="fedtide-overload-") as place:
        asyncio.run(measure(Path(place), options.seconds, options.flood))


if __name__ == "__main__":
    main()
