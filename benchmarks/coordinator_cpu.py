"""Claim: the coordinator spends at most 2 ms of CPU on a q8 update of 1 million parameters, 6 ms with its journal.

From the bytes of the MQTT messages to the folded update, through the coordinator's own code: Intake (chunks,
hash, signature), Writer (admission, decoding, FedBuff with goal 10, the version step included) and Journal
(group commits on a real disk). MQTT itself is not counted. Each figure is the median over batches of the CPU
time of all of this process's threads; the steps are timed with the same calls on the same bytes.

The floor is memory traffic: read the payload once and add one float32 vector to another, in the same run.
"""

import argparse
import hashlib
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from report import Target, own_cpu_seconds, print_report

from coordinator.aggregation import FedBuff, empty_buffer
from coordinator.intake import Arrived, Intake, Refused
from coordinator.journal import Journal
from coordinator.model_state import ModelState, close_buffer, initial_state
from coordinator.server_optimizers import SGD
from coordinator.settings import CoordinatorSettings, Rules
from coordinator.writer import Writer
from fedtide.wire import codecs, frame
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.envelope import UpdateHeader, open_update, seal_update
from fedtide.wire.ids import Counter, DeviceId, FleetId, ModelVersion, PlanId
from fedtide.wire.messages import UpdateChunk
from fedtide.wire.parameters import Schema, TensorSpec, Vector, fingerprint
from fedtide.wire.signatures import UPDATE_DOMAIN, SigningKey

FLEET: Final = FleetId("benchmark")
PLAN: Final = PlanId("0" * 32)
GOAL: Final = 10
BATCH: Final = 10
"""Updates per group commit; also the distinct updates made, since each is sent again under new counters."""
PARAMETERS: Final = (100_000, 1_000_000, 10_000_000)
PEERS_MS: Final = {"Flower": 4.3, "NVFlare": [2.1, 3.5], "APPFL FedAsync, float32 in memory": 3.1}
"""Measured by us earlier: CPU per update of 1 million parameters, decoding included, nothing journaled."""


@dataclass(frozen=True)
class Case:
    """One size and codec, with everything that is made beforehand."""

    schema: Schema
    codec: str
    key: SigningKey
    delta: Vector
    payload: bytes
    base: Vector

    @classmethod
    def of(cls, size: int, codec: str) -> "Case":
        """A delta as local training leaves it: normal, of standard deviation 0.001; seed 0."""
        tensor = TensorSpec(name="p.weight", dtype="float32", shape=(size,))
        schema = Schema(tensors=(tensor,))
        delta = np.random.default_rng(0).normal(0.0, 1e-3, size).astype(np.float32)
        payload = codecs.get(codec).encode(delta, schema)
        return cls(schema, codec, SigningKey.from_seed(bytes(32)), delta, payload, np.zeros(size, np.float32))

    def envelope(self, counter: int) -> bytes:
        """One signed update; ``counter`` also names the device, so that all are new."""
        header = UpdateHeader(
            fleet=FLEET,
            plan=PLAN,
            device=DeviceId("device"),
            counter=Counter(counter),
            base_version=ModelVersion(0),
            base_sha256=fingerprint(self.base),
            codec=self.codec,
            num_examples=100,
            local_steps=4,
            payload_bytes=len(self.payload),
            payload_sha256=hashlib.sha256(self.payload).digest(),
        )
        return seal_update(header, self.payload, self.key)

    def messages(self, counters: Iterator[int]) -> list[list[bytes]]:
        """The MQTT payloads of a batch of updates."""
        return [
            update_chunks(self.envelope(counter), Counter(counter), MAX_CHUNK_BYTES)
            for counter in itertools.islice(counters, BATCH)
        ]

    def state(self) -> ModelState:
        """The global model at version 0."""
        return initial_state(self.base, Rules(aggregator=FedBuff(goal=GOAL), server_optimizer=SGD()))


class Pipeline:
    """The coordinator's path of an update, with or without a journal."""

    def __init__(self, case: Case, journal: Journal | None) -> None:
        settings = CoordinatorSettings(fleet=FLEET, plan=Path("unused"), aggregator=FedBuff(goal=GOAL))
        self._journal = journal
        self._intake = Intake(case.schema, lambda _device: case.key.public, settings.update.max_partial_bytes)
        self._writer = Writer(
            settings,
            plan=PLAN,
            schema=case.schema,
            state=case.state(),
            marks={},
            bases=lambda _version: case.base,
        )
        self._writer.published = {ModelVersion(0): fingerprint(case.base)}

    def take(self, updates: list[list[bytes]]) -> None:
        """Receive, judge and commit one batch."""
        arrivals: list[Arrived | Refused] = []
        for messages in updates:
            for message in messages:
                arrival = self._intake.receive("device", message, now=0.0)
            assert isinstance(arrival, Arrived), arrival
            arrivals.append(arrival)
        judged = self._writer.judge(arrivals)
        assert judged.batch.totals == {"applied": len(updates)}, judged.batch.totals
        if self._journal is not None:
            self._journal.commit(judged.batch)


def cpu_ms(work: Callable[[], object], repeats: int) -> float:
    """Median CPU milliseconds of all threads over ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        before = own_cpu_seconds()
        work()
        times.append((own_cpu_seconds() - before) * 1000)
    return statistics.median(times)


def path_ms(case: Case, batches: int, directory: Path | None) -> float:
    """CPU milliseconds per update on the whole path; ``directory``: where to journal, None: nowhere."""
    journal = Journal(directory / "journal.sqlite") if directory else None
    pipeline = Pipeline(case, journal)
    counters = itertools.count(1)
    times = []
    for _ in range(batches + 1):
        updates = case.messages(counters)
        before = own_cpu_seconds()
        pipeline.take(updates)
        times.append((own_cpu_seconds() - before) * 1000 / BATCH)
    if journal:
        journal.close()
    return statistics.median(times[1:])  # the first batch touches its memory for the first time


def steps_ms(case: Case, repeats: int) -> dict[str, float]:
    """CPU milliseconds per update of each step, in its own loop."""
    envelope = case.envelope(1)
    messages = update_chunks(envelope, Counter(1), MAX_CHUNK_BYTES)
    opened = open_update(envelope, len(envelope))
    codec = codecs.get(case.codec)
    out = np.empty(case.schema.size, np.float32)
    rules = case.state().rules
    buffer = empty_buffer(case.schema.size)

    def chunks() -> None:
        for message in messages:
            frame.from_frame(message, UpdateChunk, len(message))

    def assembled_and_verified() -> None:
        intake = Intake(case.schema, lambda _device: case.key.public, 1 << 30)
        for message in messages:
            intake.receive("device", message, now=0.0)

    def fold() -> None:
        rules.aggregator.fold(
            buffer, case.delta, staleness_weight=1.0, importance=1.0, current=case.base, base=None
        )

    fold()
    full = case.state()
    full = ModelState(full.version, full.parameters, rules.aggregator.fold(
        empty_buffer(case.schema.size), case.delta, staleness_weight=1.0, importance=1.0, current=case.base,
        base=None), full.optimizer, full.rules)  # fmt: skip
    steps = {
        "parse chunk frames": chunks,
        "all of Intake": assembled_and_verified,
        "open envelope, with payload SHA-256": lambda: open_update(envelope, len(envelope)),
        "payload SHA-256 alone": lambda: hashlib.sha256(case.payload).digest(),
        "signature": lambda: case.key.public.verify(UPDATE_DOMAIN, opened.signed, opened.signature),
        "decode": lambda: codec.decode(case.payload, case.schema, out=out),
        "fold": fold,
        f"version step / {GOAL}": lambda: close_buffer(full),
    }
    timed = {}
    for name, work in steps.items():
        work()
        timed[name] = cpu_ms(work, repeats)
    timed[f"version step / {GOAL}"] /= GOAL
    return timed


def floor_ms(case: Case, repeats: int) -> float:
    """Read the payload once and add one vector to another: memory traffic that no coordinator can avoid."""
    total = np.zeros(case.schema.size, np.float32)
    source = np.frombuffer(case.payload, np.uint8)
    target = np.empty_like(source)

    def traffic() -> None:
        np.copyto(target, source)
        np.add(total, case.delta, out=total)

    traffic()
    return cpu_ms(traffic, repeats)


def measure(size: int, codec: str, directory: Path, seconds: float) -> dict[str, object]:
    """All figures of one size and codec; about ``seconds`` of CPU per column."""
    case = Case.of(size, codec)
    guess_ms = 3e-6 * size + 0.3
    batches = max(3, min(40, math.ceil(seconds * 1000 / (guess_ms * BATCH))))
    repeats = max(5, min(200, math.ceil(seconds * 200 / guess_ms)))
    off = path_ms(case, batches, None)
    with tempfile.TemporaryDirectory(prefix="coordinator-cpu-", dir=directory) as place:
        on = path_ms(case, batches, Path(place))
    steps = steps_ms(case, repeats)
    return {
        "parameters": size,
        "codec": codec,
        "payload_bytes": len(case.payload),
        "journal_off_ms": off,
        "journal_on_ms": on,
        "journal_ms": on - off,
        "floor_ms": floor_ms(case, repeats),
        "steps_ms": steps,
        "share_of_path": {name: step / off for name, step in steps.items()},
        "batches": batches,
    }


def main() -> None:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="of the journal; on a real disk"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="rough CPU time per figure")
    parser.add_argument("--parameters", type=int, nargs="*", default=PARAMETERS)
    options = parser.parse_args()
    results = []
    for size, codec in itertools.product(options.parameters, ("q8", "float32")):
        results.append(measure(size, codec, options.directory, options.seconds))
        print(results[-1], flush=True)
    held = next((r for r in results if r["parameters"] == 1_000_000 and r["codec"] == "q8"), None)
    targets = [
        Target("q8, 1 M parameters, journal off, CPU ms per update", held and held["journal_off_ms"], 2.0),  # type: ignore[arg-type]
        Target("q8, 1 M parameters, journal on, CPU ms per update", held and held["journal_on_ms"], 6.0),  # type: ignore[arg-type]
    ]
    print_report(
        "an update of 1 M parameters costs the coordinator at most 2 ms of CPU, 6 ms with its journal",
        targets,
        floor="read the payload once and add one float32 vector to another, in the same run",
        peers_ms=PEERS_MS,
        batch=BATCH,
        goal=GOAL,
        results=results,
    )


if __name__ == "__main__":
    main()
