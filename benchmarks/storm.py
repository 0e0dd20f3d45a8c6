"""Claim: 10,000 devices that come within a second all have a receipt; nothing is lost or applied twice.

Each device connects, announces itself, subscribes to what agents subscribe to, and sends one signed update
of 20 kB when it is its turn. mosquitto with the limits that are shipped, ``fedtide coordinator run`` in a
process of its own, its journal synced on a real disk. The devices share one process: what they cost is not
what agents cost, and is given so that it can be told from the rest. So is the broker's part.

Heads are 10 s apart: every device gets every head, and at one a second they would be most of the traffic.

The floor is what no coordinator can leave out: check as many signatures, hash as many bytes, and write and
sync them in as many parts as there are full batches, in the same run.
"""

import argparse
import asyncio
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from report import Target, cpu_seconds, own_cpu_seconds, peak_rss_mb, print_report

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests" / "rig"), str(ROOT / "tests" / "coordinator")]

from light_devices import LightUpdate  # noqa: E402
from storm_run import Storm, StormFleet, device_key, device_names, signed_updates, storm, storm_fleet  # noqa: E402

from coordinator.settings import Journal  # noqa: E402
from coordinator.status import Updates  # noqa: E402
from fedtide.wire import frame  # noqa: E402
from fedtide.wire.chunks import MAX_CHUNK_BYTES  # noqa: E402
from fedtide.wire.envelope import max_envelope_bytes, open_update  # noqa: E402
from fedtide.wire.messages import UpdateChunk  # noqa: E402

DEVICES: Final = 10_000
WITHIN_S: Final = 1.0
HEAD_EVERY_S: Final = 10.0
DEADLINE_S: Final = 600.0
SPARE_DESCRIPTORS: Final = 200
FIRST_TRY_S: Final = 24.4
"""Context: a feasibility test of the scheme, 120 lines without admission, folding or model; not this run."""


@dataclass(frozen=True)
class Cost:
    """CPU seconds and peak MB (10⁶ bytes) of one process, and MB it had the disk write."""

    cpu_s: float
    rss_mb: float
    written_mb: float

    @classmethod
    def of(cls, pid: int) -> "Cost":
        """So far."""
        return cls(cpu_seconds(pid), peak_rss_mb(pid), _written_mb(pid))

    def since(self, before: "Cost") -> "Cost":
        """What was used since ``before``; the peak is of all the time."""
        return Cost(self.cpu_s - before.cpu_s, self.rss_mb, self.written_mb - before.written_mb)


@dataclass(frozen=True)
class Measured:
    """One storm and what it cost."""

    storm: Storm
    updates: Updates
    applied_once: int
    """Devices of which the journal says that exactly one update was applied."""
    start_s: float
    """Until the coordinator was connected, the writing of the devices' key files included."""
    coordinator: Cost
    broker: Cost
    devices_cpu_s: float


@dataclass(frozen=True)
class Floor:
    """CPU seconds to check and hash, and seconds of the clock to write and sync."""

    cpu_s: float
    disk_s: float


async def measure(place: Path, devices: int, within_s: float, head_every_s: float) -> tuple[Measured, Floor]:
    """Run one storm."""
    began = time.monotonic()
    async with storm_fleet(place, devices, head_every_s=head_every_s) as fleet:
        start_s = time.monotonic() - began
        updates = list(signed_updates(device_names(devices), await fleet.head()))
        measured = await _measure(fleet, updates, within_s, start_s)
    return measured, floor(place, updates)


async def _measure(
    fleet: StormFleet, updates: Sequence[LightUpdate], within_s: float, start_s: float
) -> Measured:
    pids = fleet.pid, fleet.broker.pid
    before, own = [Cost.of(pid) for pid in pids], own_cpu_seconds()
    seen = await storm(fleet, updates, within_s=within_s, deadline_s=DEADLINE_S)
    devices_cpu_s = own_cpu_seconds() - own
    coordinator, broker = (Cost.of(pid).since(then) for pid, then in zip(pids, before, strict=True))
    counted = (await fleet.settled(len(updates))).updates
    await fleet.stop()
    applied_once = sum(applied == 1 for applied in fleet.applied().values())
    return Measured(seen, counted, applied_once, start_s, coordinator, broker, devices_cpu_s)


def floor(place: Path, updates: Sequence[LightUpdate]) -> Floor:
    """Check each signature, hash each payload, write and sync everything."""
    chunks = [frame.from_frame(update.messages[0], UpdateChunk, 2 * MAX_CHUNK_BYTES) for update in updates]
    keys = [device_key(update.device).public for update in updates]
    before = own_cpu_seconds()
    for chunk, key in zip(chunks, keys, strict=True):
        # It hashes the payload once, as the coordinator has to.
        open_update(chunk.content, max_envelope_bytes(MAX_CHUNK_BYTES)).verify(key)
    cpu_s = own_cpu_seconds() - before
    began, batch = time.monotonic(), Journal().max_batch
    with (place / "floor").open("wb", buffering=0) as file:
        for start in range(0, len(chunks), batch):
            file.write(b"".join(chunk.content for chunk in chunks[start : start + batch]))
            os.fdatasync(file.fileno())
    return Floor(cpu_s, time.monotonic() - began)


def allow_connections(devices: int) -> None:
    """Raise this process's limit of open files as far as it may; the broker is a child and takes it over.

    Raises:
        SystemExit: it may not be raised far enough.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = devices + SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(
            f"{devices:,} devices need {wanted:,} open files, and this user may have {hard:,}: "
            f"raise the hard limit (ulimit -Hn {wanted}), or pass --devices {hard - SPARE_DESCRIPTORS}"
        )


def _written_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "write_bytes":
            return int(value) / 1e6
    raise ValueError(f"process {pid} has no write_bytes: not Linux, or it has ended")


def report(measured: Measured, least: Floor, devices: int, within_s: float, head_every_s: float) -> None:
    """Print the line."""
    seen, counted, coordinator = measured.storm, measured.updates, measured.coordinator
    claim = f"{devices:,} devices that come within {within_s:g} s all have a receipt; none lost, none twice"
    fates = counted.applied + counted.duplicate + sum(counted.rejected.values()) + counted.waiting
    print_report(
        claim,
        [
            Target("devices without a receipt that says applied", devices - seen.verdicts["applied"], 0),
            Target("devices whose update is not applied exactly once", devices - measured.applied_once, 0),
            Target("received and not accounted for", abs(counted.received - fates), 0),
            Target("coordinator, peak RSS in MB", coordinator.rss_mb, 256),
        ],
        floor="signatures checked, payloads hashed once; bytes written and synced, in the same run",
        devices=devices,
        within_s=within_s,
        head_every_s=head_every_s,
        seconds=seen.seconds,
        connecting_s=seen.connecting_s,
        receipts_per_s=devices / seen.seconds,
        updates_sent_per_device=seen.record.sent / devices,
        connections_lost=seen.record.lost_connections,
        coordinator_start_s=measured.start_s,
        coordinator_cpu_s=coordinator.cpu_s,
        coordinator_cpu_ms_per_update=coordinator.cpu_s / seen.record.sent * 1e3,
        coordinator_written_mb=coordinator.written_mb,
        broker_cpu_s=measured.broker.cpu_s,
        broker_rss_mb=measured.broker.rss_mb,
        devices_cpu_s=measured.devices_cpu_s,
        floor_cpu_s=least.cpu_s,
        floor_disk_s=least.disk_s,
        times_floor_cpu=coordinator.cpu_s / least.cpu_s,
        first_try_s=FIRST_TRY_S,
        load_average=os.getloadavg(),
    )


def main() -> None:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=DEVICES)
    parser.add_argument("--within", type=float, default=WITHIN_S, help="seconds in which all connect")
    parser.add_argument("--head-every", type=float, default=HEAD_EVERY_S, help="seconds between two heads")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="of the journal; on a real disk"
    )
    options = parser.parse_args()
    allow_connections(options.devices)
    with tempfile.TemporaryDirectory(prefix="storm-", dir=options.directory) as place:
        measured, least = asyncio.run(
            measure(Path(place), options.devices, options.within, options.head_every)
        )
    report(measured, least, options.devices, options.within, options.head_every)


if __name__ == "__main__":
    main()
