"""Claim: a q8 update of 1 million parameters costs the coordinator 2 ms of CPU, 6 ms with its journal.

From the bytes of the MQTT messages to the folded update, through the coordinator's own code: Intake (chunks,
hash, signature), Writer (admission, decoding, FedBuff with goal 10, the version step included) and Journal
(group commits on a real disk). MQTT itself is not counted. Every update starts from version 0, so all but the
first ten are stale and are scaled as they are folded, as most are in a real fleet.

Each figure is a median of the CPU time of all of this process's threads. The hash of the payload is timed
again between the batches: on processors without SHA instructions it is the largest single step.

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
from typing import Any, Final, TypeVar

import numpy as np
from report import Target, own_cpu_seconds, print_report

from coordinator.aggregation import FedBuff
from coordinator.intake import Arrived, Intake, Refused
from coordinator.journal import Journal
from coordinator.model_state import ModelState, close_buffer, fold_update, initial_state
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

T = TypeVar("T")

FLEET: Final = FleetId("benchmark")
PLAN: Final = PlanId("0" * 32)
GOAL: Final = 10
BATCH: Final = 10
"""Updates per group commit; also the distinct updates made, since each is sent again under new counters."""
PARAMETERS: Final = (100_000, 1_000_000, 10_000_000)
PEERS_MS: Final = {"Flower": 4.3, "NVFlare": [2.1, 3.5], "APPFL FedAsync, float32 in memory": 3.1}
"""Context from earlier notes, per update of 1 million parameters; not measured in this run."""


@dataclass(frozen=True)
class Case:
    """One size and codec, with everything that is made beforehand."""

    schema: Schema
    codec: str
    key: SigningKey
    delta: Vector
    payload: bytes
    base: Vector
    base_sha256: bytes
    payload_sha256: bytes

    @classmethod
    def of(cls, size: int, codec: str) -> "Case":
        """A delta as local training leaves it: normal, of standard deviation 0.001; seed 0."""
        tensor = TensorSpec(name="p.weight", dtype="float32", shape=(size,))
        schema = Schema(tensors=(tensor,))
        delta = np.random.default_rng(0).normal(0.0, 1e-3, size).astype(np.float32)
        payload = codecs.get(codec).encode(delta, schema)
        base = np.zeros(size, np.float32)
        return cls(
            schema,
            codec,
            SigningKey.from_seed(bytes(32)),
            delta,
            payload,
            base,
            base_sha256=fingerprint(base),
            payload_sha256=hashlib.sha256(payload).digest(),
        )

    def envelope(self, counter: int) -> bytes:
        """One signed update of the only device."""
        header = UpdateHeader(
            fleet=FLEET,
            plan=PLAN,
            device=DeviceId("device"),
            counter=Counter(counter),
            base_version=ModelVersion(0),
            base_sha256=self.base_sha256,
            codec=self.codec,
            num_examples=100,
            local_steps=4,
            payload_bytes=len(self.payload),
            payload_sha256=self.payload_sha256,
        )
        return seal_update(header, self.payload, self.key)

    def messages(self, counters: Iterator[int]) -> list[list[bytes]]:
        """The MQTT payloads of a batch of updates."""
        return [
            update_chunks(self.envelope(counter), Counter(counter), MAX_CHUNK_BYTES)
            for counter in itertools.islice(counters, BATCH)
        ]

    def state(self, goal: int = GOAL) -> ModelState:
        """The global model at version 0."""
        return initial_state(self.base, Rules(aggregator=FedBuff(goal=goal), server_optimizer=SGD()))


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
        self._writer.published = {ModelVersion(0): case.base_sha256}

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


@dataclass(frozen=True)
class WholePath:
    """CPU milliseconds per update on the whole path, and of the payload's SHA-256 between the batches."""

    total_ms: float
    payload_hash_ms: float


def whole_path(case: Case, batches: int, directory: Path | None) -> WholePath:
    """Take ``batches`` batches; ``directory``: where to journal, None: nowhere."""
    journal = Journal(directory / "journal") if directory else None
    pipeline = Pipeline(case, journal)
    counters = itertools.count(1)
    path_ms, hash_ms = [], []
    for _ in range(batches + 1):
        updates = case.messages(counters)
        path_ms.append(cpu_ms(pipeline.take, updates) / BATCH)
        hash_ms.append(cpu_ms(hashlib.sha256, case.payload))
    if journal:
        journal.close()
    # The first batch touches its memory for the first time.
    return WholePath(statistics.median(path_ms[1:]), statistics.median(hash_ms[1:]))


def cpu_ms(work: Callable[[T], object], argument: T) -> float:
    """CPU milliseconds of all threads for one call."""
    before = own_cpu_seconds()
    work(argument)
    return (own_cpu_seconds() - before) * 1000


def median_cpu_ms(work: Callable[[], object], repeats: int) -> float:
    """Median CPU milliseconds of all threads over ``repeats`` calls, after one that is not counted."""
    work()
    return statistics.median(cpu_ms(lambda _: work(), None) for _ in range(repeats))


def steps_ms(case: Case, repeats: int) -> dict[str, float]:
    """CPU milliseconds per update of each step, in its own loop."""
    envelope = case.envelope(1)
    messages = update_chunks(envelope, Counter(1), MAX_CHUNK_BYTES)
    opened = open_update(envelope, len(envelope))
    codec = codecs.get(case.codec)
    out = np.empty(case.schema.size, np.float32)

    def parse_chunks() -> None:
        for message in messages:
            frame.from_frame(message, UpdateChunk, len(message))

    def intake() -> None:
        new = Intake(case.schema, lambda _device: case.key.public, 1 << 30)
        for message in messages:
            new.receive("device", message, now=0.0)

    def fold(state: ModelState, staleness_weight: float) -> ModelState:
        return fold_update(state, case.delta, staleness_weight, 1.0, None)

    partly_full = fold(case.state(goal=10**6), 1.0)
    steps: dict[str, Callable[[], object]] = {
        "parse chunk frames": parse_chunks,
        "intake in all": intake,
        "open envelope, with payload SHA-256": lambda: open_update(envelope, len(envelope)),
        "payload SHA-256": lambda: hashlib.sha256(case.payload),
        "signature": lambda: case.key.public.verify(UPDATE_DOMAIN, opened.signed, opened.signature),
        "decode": lambda: codec.decode(case.payload, case.schema, out=out),
        "fold, fresh": lambda: fold(partly_full, 1.0),
        "fold, stale": lambda: fold(partly_full, 0.5),
    }
    timed = {name: median_cpu_ms(work, repeats) for name, work in steps.items()}
    version_step_ms = median_cpu_ms(lambda: close_buffer(partly_full), repeats)
    return {**timed, f"version step / {GOAL}": version_step_ms / GOAL}


def floor_ms(case: Case, repeats: int) -> float:
    """Read the payload once and add one vector to another: traffic that no coordinator can avoid."""
    total = np.zeros(case.schema.size, np.float32)
    source = np.frombuffer(case.payload, np.uint8)
    target = np.empty_like(source)

    def traffic() -> None:
        np.copyto(target, source)
        np.add(total, case.delta, out=total)

    return median_cpu_ms(traffic, repeats)


def measure(size: int, codec: str, directory: Path, seconds: float) -> dict[str, object]:
    """All figures of one size and codec; about ``seconds`` of CPU for each."""
    case = Case.of(size, codec)
    guess_ms = 8e-6 * size + 0.3
    batches = max(3, min(40, math.ceil(seconds * 1000 / (guess_ms * BATCH))))
    repeats = max(5, min(200, math.ceil(seconds * 100 / guess_ms)))
    off = whole_path(case, batches, None)
    with tempfile.TemporaryDirectory(prefix="coordinator-cpu-", dir=directory) as place:
        on = whole_path(case, batches, Path(place))
    steps = steps_ms(case, repeats)
    floor = floor_ms(case, repeats)
    return {
        "parameters": size,
        "codec": codec,
        "payload_bytes": len(case.payload),
        "journal_off_ms": off.total_ms,
        "journal_on_ms": on.total_ms,
        "journal_off_without_payload_hash_ms": off.total_ms - off.payload_hash_ms,
        "journal_on_without_payload_hash_ms": on.total_ms - on.payload_hash_ms,
        "payload_hash_ms": off.payload_hash_ms,
        "journal_ms": on.total_ms - off.total_ms,
        "floor_ms": floor,
        "times_floor": off.total_ms / floor,
        "steps_ms": steps,
        "share_of_path": {name: step / off.total_ms for name, step in steps.items()},
        "batches": batches,
    }


def _has_sha_instructions() -> bool:
    """Whether this processor hashes in hardware (x86: sha_ni, Arm: sha2)."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return bool(words & {"sha_ni", "sha2"})


def main() -> None:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="of the journal; on a real disk"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="rough CPU time per figure")
    parser.add_argument("--parameters", type=int, nargs="*", default=PARAMETERS, help="sizes to measure")
    options = parser.parse_args()
    measured = {}
    for size, codec in itertools.product(options.parameters, ("q8", "float32")):
        measured[size, codec] = measure(size, codec, options.directory, options.seconds)
        print(measured[size, codec], flush=True)
    held: dict[str, Any] = measured.get((1_000_000, "q8"), {})
    print_report(
        "a q8 update of 1 M parameters costs the coordinator 2 ms of CPU, 6 ms with its journal",
        [
            Target("journal off, CPU ms per update", held.get("journal_off_ms"), 2.0),
            Target("journal on, CPU ms per update", held.get("journal_on_ms"), 6.0),
        ],
        floor="read the payload once and add one float32 vector to another, in the same run",
        sha_instructions=_has_sha_instructions(),
        peers_ms=PEERS_MS,
        batch=BATCH,
        goal=GOAL,
        results=list(measured.values()),
    )


if __name__ == "__main__":
    main()
