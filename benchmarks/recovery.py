"""Claim: a coordinator that was killed with a 1 GB journal accepts updates again within 5 seconds.

The journal is written by the coordinator's own Writer, in updates of 20 kB, and the kill comes at the worst
moment: just before a snapshot, with as many bytes to replay as the settings allow by default. A new process
then starts, with the files out of the system's memory, and says when it would take the next update: after its
imports, and after the recovery. MQTT is not counted.

The floor is the time to read as many bytes from the same disk, likewise out of memory, in the same run.
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec
import receipts
from report import Target, own_cpu_seconds, peak_rss_mb, print_report

from coordinator.aggregation import FedBuff
from coordinator.intake import Arrived, Intake
from coordinator.journal import Published
from coordinator.recovery import base_parameters, recover
from coordinator.settings import CoordinatorSettings, Journal
from coordinator.writer import Writer
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.ids import Counter, DeviceId, ModelVersion
from fedtide.wire.parameters import fingerprint

SETTINGS: Final = CoordinatorSettings(
    fleet=receipts.FLEET,
    plan=Path("unused"),
    aggregator=FedBuff(goal=10),
    journal=Journal(snapshot_every_updates=1_000_000),
)
BATCH: Final = 64
DEVICES: Final = 1_000


class Started(msgspec.Struct, frozen=True):
    """What the new process says. ``imports_s``: from its start to the end of its imports, in seconds."""

    imports_s: float
    recovery_s: float
    cpu_s: float
    replayed: int
    peak_rss_mb: float


def write(directory: Path, total_bytes: int) -> int:
    """Journal updates until so many bytes are there and the next snapshot is due; how many updates."""
    plan = receipts.built_plan()
    made, schema = receipts.Updates(plan), plan.plan.manifest.schema
    recovered = recover(directory, SETTINGS, plan)
    journal = recovered.journal
    journal.add_published(Published(ModelVersion(0), fingerprint(plan.initial), 0.0), 10)
    writer = Writer(
        SETTINGS,
        plan=plan.plan.id,
        schema=schema,
        state=recovered.state,
        marks={},
        bases=base_parameters(recovered.models, plan),
    )
    writer.published = {ModelVersion(0): fingerprint(plan.initial)}
    intake = Intake(schema, lambda _device: receipts.KEY.public, SETTINGS.update.max_partial_bytes)
    written, every = 0, SETTINGS.journal.snapshot_every_bytes
    for number in itertools.count():
        arrivals = []
        for place in range(BATCH):
            device = DeviceId(f"device-{(number * BATCH + place) % DEVICES}")
            counter = Counter(1 + number)
            (message,) = update_chunks(made.envelope(device, counter), counter, MAX_CHUNK_BYTES)
            arrival = intake.receive(device, message, 0.0)
            assert isinstance(arrival, Arrived), arrival
            arrivals.append(arrival)
        before = journal.since_bytes
        journal.commit(writer.judge(arrivals).batch)
        written += journal.since_bytes - before
        if journal.since_bytes + (journal.since_bytes - before) >= every:
            if written + every / 2 >= total_bytes:
                break
            journal.snapshot(writer.state)
    updates = journal.totals()["applied"]
    recovered.close()
    return updates


def forget(directory: Path) -> None:
    """Have the system forget what it has read and written of these files."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_floor(files: list[Path]) -> float:
    """Seconds to read these files, 4 MB at a time."""
    begun = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(4 << 20):
                pass
    return time.perf_counter() - begun


def start(directory: Path) -> Started:
    """A new process that recovers."""
    command = [sys.executable, __file__, "--recover", str(directory), "--begun", repr(time.time())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Started)


def recover_and_tell(directory: Path, begun: float) -> None:
    """In the new process: everything up to the first update it would take."""
    imports_s = time.time() - begun
    clock = time.perf_counter()
    plan = receipts.built_plan()
    recovered = recover(directory, SETTINGS, plan)
    recovered.journal.next_epoch()
    recovery_s = time.perf_counter() - clock
    said = Started(imports_s, recovery_s, own_cpu_seconds(), recovered.replayed, peak_rss_mb())
    recovered.close()
    print(msgspec.json.encode(said).decode())


def main() -> None:
    """Run it and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on a real disk")
    parser.add_argument("--recover", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.recover:
        recover_and_tell(options.recover, options.begun)
        return
    place = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        updates = write(place, options.bytes)
        journal = place / "journal"
        files = sorted(journal.glob("*.segment"))
        size = sum(file.stat().st_size for file in files)
        print(f"{updates} updates, {len(files)} segments of {size:,} bytes", flush=True)
        last = [files[-1], *journal.glob(f"{files[-1].stem}.safetensors")]
        replayed_bytes = last[0].stat().st_size
        runs, floors = [], []
        for _ in range(options.repeats):
            forget(place)
            floors.append(read_floor(last))
            forget(place)
            runs.append(start(place))
            print(f"{runs[-1]}; reading alone {floors[-1]:.2f} s", flush=True)
    finally:
        shutil.rmtree(place)
    print_report(
        "a coordinator that was killed with a 1 GB journal accepts updates again within 5 seconds",
        [Target("seconds", statistics.median(run.imports_s + run.recovery_s for run in runs), 5.0)],
        journal_bytes=size,
        replayed_updates=runs[0].replayed,
        replayed_bytes=replayed_bytes,
        imports_s=statistics.median(run.imports_s for run in runs),
        recovery_s=statistics.median(run.recovery_s for run in runs),
        cpu_s=statistics.median(run.cpu_s for run in runs),
        reading_alone_s=statistics.median(floors),
        peak_rss_mb=max(run.peak_rss_mb for run in runs),
    )


if __name__ == "__main__":
    main()
