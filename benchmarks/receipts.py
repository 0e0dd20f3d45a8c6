"""Claim: the coordinator makes 2,000 updates of 20 kB durable and receipts them, each second.

Through the coordinator's own code without MQTT: Intake (chunks, hash, signature), Writer (decoding, folding),
Committer (group commit, acknowledgement, a signed receipt for each) and the journal on a real disk. The
devices are far ahead: whenever a batch is judged, the next is there. Their updates are made beforehand.

Beside it, in the same run and the same directory: the journal alone, which commits the same updates without
looking into them, and the floor, which is the disk's own: the same bytes appended and synced in as many
batches. What the processor needs for an update's signature, its receipt's, and its hashes is timed too: on
two busy cores that, and not the disk, is what bounds the receipts.
"""

import argparse
import asyncio
import hashlib
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from report import Target, own_cpu_seconds, peak_rss_mb, print_report

from coordinator.aggregation import FedBuff
from coordinator.committer import Committer, JournalThread
from coordinator.entries import UpdateEntry
from coordinator.intake import Intake
from coordinator.journal import Journal, Published
from coordinator.line import Waiting
from coordinator.plan.file import BuiltPlan
from coordinator.recovery import base_parameters, recover
from coordinator.settings import CoordinatorSettings
from coordinator.writer import Writer
from fedtide.wire import codecs
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.clock import SYSTEM_CLOCK
from fedtide.wire.disk import OS_DISK
from fedtide.wire.envelope import UpdateHeader, seal_update
from fedtide.wire.ids import Counter, DeviceId, FleetId, ModelVersion
from fedtide.wire.link import Connection, Delivery
from fedtide.wire.parameters import Schema, TensorSpec, Vector, fingerprint
from fedtide.wire.plan import Limits, Plan, PlanManifest, Verified
from fedtide.wire.signatures import UPDATE_DOMAIN, SigningKey
from fedtide.wire.training import Training

FLEET: Final = FleetId("benchmark")
PARAMETERS: Final = 19_200
"""In codec q8, 20 kB with the envelope."""
KEY: Final = SigningKey.from_seed(bytes(32))


def built_plan(size: int = PARAMETERS) -> BuiltPlan:
    """A plan of one tensor that no device ever runs."""
    tensor = TensorSpec(name="p.weight", dtype="float32", shape=(size,))
    manifest = PlanManifest(
        format=1,
        name="benchmark",
        opset=18,
        producer="benchmark",
        min_onnxruntime="1.23",
        schema=Schema(tensors=(tensor,)),
        local_state=(),
        local_buffers=(),
        inputs=(TensorSpec(name="x0", dtype="float32", shape=(None, 3)),),
        targets=None,
        learning_rate_input="learning_rate",
        min_batch=1,
        train_outputs=("p.weight'", "loss"),
        evaluation_state=("p.weight",),
        metric=None,
        optimizer="SGD",
        operators=("Gemm",),
        training=Training(),
        limits=Limits(),
        verified=Verified(
            steps=1, median_gradient_error=0.0, max_gradient_error=0.0, torch_float32_max_error=0.0
        ),
        train_sha256=hashlib.sha256(b"").digest(),
        evaluation_sha256=hashlib.sha256(b"").digest(),
    )
    return BuiltPlan(Plan(manifest, train=b"", evaluation=b""), np.zeros(size, np.float32))


class Updates:
    """Envelopes on version 0, all with one payload: normal, of standard deviation 0.001; seed 0."""

    def __init__(self, plan: BuiltPlan) -> None:
        delta: Vector = np.random.default_rng(0).normal(0.0, 1e-3, plan.initial.size).astype(np.float32)
        self._plan = plan
        self._payload = codecs.get("q8").encode(delta, plan.plan.manifest.schema)
        self._payload_sha256 = hashlib.sha256(self._payload).digest()
        self._base_sha256 = fingerprint(plan.initial)

    def envelope(self, device: DeviceId, counter: int) -> bytes:
        """One signed update."""
        header = UpdateHeader(
            fleet=FLEET,
            plan=self._plan.plan.id,
            device=device,
            counter=Counter(counter),
            base_version=ModelVersion(0),
            base_sha256=self._base_sha256,
            codec="q8",
            num_examples=100,
            local_steps=4,
            payload_bytes=len(self._payload),
            payload_sha256=self._payload_sha256,
        )
        return seal_update(header, self._payload, KEY)


@dataclass
class Receipts:
    """Stands for the connection: takes receipts, and says when the next update may come."""

    acknowledged: int = 0
    sent: int = 0
    room: asyncio.Event = field(default_factory=asyncio.Event)

    def acknowledge(self, _delivery: Delivery) -> None:
        """See ``Connection``."""
        self.acknowledged += 1

    async def publish(self, _topic: str, _payload: bytes, **_options: object) -> None:
        """See ``Connection``."""
        self.sent += 1
        self.room.set()

    async def more(self, committing: asyncio.Task[None]) -> None:
        """Wait for a receipt. Raises what ended the committer."""
        self.room.clear()
        waiting = asyncio.create_task(self.room.wait())
        await asyncio.wait([waiting, committing], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if committing.done():
            committing.result()


@dataclass(frozen=True)
class Outcome:
    """What a run took.

    Attributes:
        wall_s: from the first message to the last receipt.
        cpu_s: of all threads.
        batches: group commits.
        bytes: in the journal.
    """

    wall_s: float
    cpu_s: float
    batches: int
    bytes: int


async def run(directory: Path, messages: Sequence[tuple[DeviceId, bytes]], ahead: int) -> Outcome:
    """Give the coordinator all messages, never more than ``ahead`` of what it has receipted."""
    plan = built_plan()
    settings = CoordinatorSettings(fleet=FLEET, plan=Path("unused"), aggregator=FedBuff(goal=10))
    recovered = recover(directory, settings, plan)
    recovered.journal.add_published(Published(ModelVersion(0), fingerprint(plan.initial), 0.0), 10)
    schema = plan.plan.manifest.schema
    writer = Writer(
        settings,
        plan=plan.plan.id,
        schema=schema,
        state=recovered.state,
        marks=recovered.journal.marks(),
        bases=base_parameters(recovered.models, plan),
    )
    writer.published = {ModelVersion(0): fingerprint(plan.initial)}
    thread, receipts = JournalThread(), Receipts()
    committer = Committer(
        settings,
        writer,
        recovered,
        journal_thread=thread,
        key=KEY,
        clock=SYSTEM_CLOCK,
        epoch=recovered.journal.next_epoch(),
        on_version=lambda: None,
    )
    intake = Intake(schema, lambda _device: KEY.public, settings.update.max_partial_bytes)
    connection: Connection = receipts  # type: ignore[assignment]
    committing = asyncio.create_task(committer.run())
    begun, cpu, before = time.perf_counter(), own_cpu_seconds(), recovered.journal.last_sequence()
    for number, (device, message) in enumerate(messages):
        while number - receipts.sent >= ahead:
            await receipts.more(committing)
        arrival = intake.receive(device, message, 0.0)
        assert arrival is not None
        committer.put(Waiting(arrival, Delivery("", b"", 0, 1, retained=False), connection))
        if number % 8 == 7:
            await asyncio.sleep(0)  # as between the reads of a socket
    while receipts.sent < len(messages):
        await receipts.more(committing)
    wall_s, cpu_s = time.perf_counter() - begun, own_cpu_seconds() - cpu
    journal = recovered.journal
    batches = sum(stored.head.last for _, stored in journal.stored_after(before))
    size = sum(file.stat().st_size for file in (directory / "journal").glob("*.segment"))
    assert committer.accounting.applied == receipts.acknowledged == len(messages)
    committer.finish()
    await committing
    thread.close()
    recovered.close()
    return Outcome(wall_s, cpu_s, batches, size)


def journal_alone(
    directory: Path, updates: Sequence[tuple[DeviceId, bytes]], batch: int
) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads, to commit the same updates without looking into them."""
    journal = Journal(directory / "alone")
    begun, cpu = time.perf_counter(), own_cpu_seconds()
    for start in range(0, len(updates), batch):
        part = [
            UpdateEntry(device, Counter(start + place), ModelVersion(0), 1.0, 1.0, message, 0)
            for place, (device, message) in enumerate(updates[start : start + batch])
        ]
        journal.add(*part)
    taken = time.perf_counter() - begun, own_cpu_seconds() - cpu
    journal.close()
    return taken


def disk_floor(directory: Path, batches: int, size: int) -> float:
    """Seconds to append and sync the same bytes in the same number of batches."""
    content, log = os.urandom(size // batches), OS_DISK.open_log(directory / "floor")
    begun = time.perf_counter()
    for _ in range(batches):
        log.append(content)
        log.sync()
    seconds = time.perf_counter() - begun
    log.close()
    (directory / "floor").unlink()
    return seconds


def crypto_ms(envelope: bytes) -> float:
    """CPU milliseconds to check one signature, make one, and hash an update twice, as its path does."""
    content = envelope[:400]
    signature = KEY.sign(UPDATE_DOMAIN, content)
    times = []
    for _ in range(200):
        before = own_cpu_seconds()
        KEY.public.verify(UPDATE_DOMAIN, content, signature)
        KEY.sign(UPDATE_DOMAIN, content)
        hashlib.sha256(envelope)
        hashlib.sha256(envelope[: 16 * 1024])
        times.append(1000 * (own_cpu_seconds() - before))
    return statistics.median(times)


def main() -> None:
    """Run it and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--devices", type=int, default=1_000)
    parser.add_argument("--batch", type=int, default=64, help="of the journal and the disk alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on a real disk")
    options = parser.parse_args()
    updates, plan = deque[tuple[DeviceId, bytes]](), Updates(built_plan())
    for number in range(options.updates):
        device, counter = DeviceId(f"device-{number % options.devices}"), 1 + number // options.devices
        envelope = plan.envelope(device, counter)
        (message,) = update_chunks(envelope, Counter(counter), MAX_CHUNK_BYTES)
        updates.append((device, message))
    print(f"{options.updates} updates of {len(envelope)} bytes from {options.devices} devices", flush=True)
    rates, alone, floors, cpus, sizes, alone_cpus = [], [], [], [], [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(dir=options.directory) as place:
            done = asyncio.run(run(Path(place), list(updates), min(256, options.devices)))
            alone_s, alone_cpu_s = journal_alone(Path(place), list(updates), options.batch)
            floor_s = disk_floor(Path(place), -(-options.updates // options.batch), done.bytes)
        rates.append(options.updates / done.wall_s)
        floors.append(options.updates / floor_s)
        cpus.append(1000 * done.cpu_s / options.updates)
        sizes.append(options.updates / done.batches)
        alone.append(options.updates / alone_s)
        alone_cpus.append(1000 * alone_cpu_s / options.updates)
        print(
            f"{rates[-1]:,.0f} receipts/s, {sizes[-1]:.0f} a batch; in batches of {options.batch}: "
            f"journal {alone[-1]:,.0f}/s, disk {floors[-1]:,.0f}/s",
            flush=True,
        )
    print_report(
        "the coordinator makes 2,000 updates of 20 kB durable and receipts them, each second",
        [
            Target("receipts per second", statistics.median(rates), 2_000.0, at_most=False),
            Target(
                "durable updates per second, journal alone", statistics.median(alone), 2_000.0, at_most=False
            ),
        ],
        update_bytes=len(envelope),
        disk_alone_per_s=statistics.median(floors),
        cpu_ms_per_update=statistics.median(cpus),
        journal_cpu_ms_per_update=statistics.median(alone_cpus),
        signatures_and_hashes_cpu_ms_per_update=crypto_ms(envelope),
        updates_per_batch=statistics.median(sizes),
        rates=rates,
        peak_rss_mb=peak_rss_mb(),
    )


if __name__ == "__main__":
    main()
