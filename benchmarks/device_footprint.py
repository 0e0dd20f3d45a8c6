"""Claim: an edge agent fits a small machine: 85 MB of memory, 0.4 CPU seconds to its first training.

The real process, ``fedtide agent run``, in a fleet of one with the real coordinator over mosquitto, trains an
MLP 64-128-10 on digits. Measured: peak resident memory after some updates; CPU seconds from the start of the
process to its first training, connecting, fetching and checking plan and model included; the installed size
of all distributions an agent needs; and training steps per CPU second beside torch (eager, the same model,
one thread, batches of 32).

The floor of memory and start-up is Python importing numpy and onnxruntime, measured in the same run.
"""

import argparse
import importlib.metadata
import itertools
import math
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import digits
import numpy as np
import torch
from packaging.requirements import Requirement
from process_fleet import DEADLINE_S, HERE, POLL_S, ProcessFleet, running_fleet, set_up_device, start_python
from report import Target, own_cpu_seconds, peak_rss_mb, print_report

from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Trainer

PEERS: Final = {"Flower, device side": {"installed_mb": 230.0, "rss_mb": 121.0}}
"""Context from earlier notes; not measured in this run."""
COORDINATOR: Final = """\
plan = "{plan}"
aggregator = {{ kind = "fedbuff", goal = 1 }}
publish.min_interval_s = 0.0
"""
FLOOR: Final = """
import time, numpy, onnxruntime
from pathlib import Path
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(time.process_time(), int(peak) * 1024 / 1e6)
"""


def start_up(fleet: ProcessFleet, name: str, dataset: Dataset, updates: int) -> tuple[float, float]:
    """Run one agent for some updates: CPU seconds to the first training, and peak resident MB."""
    config = set_up_device(fleet.place / name, name, dataset, fleet)
    command = [str(HERE / "first_step.py"), "agent", "run", "--config", str(config)]
    time.sleep(1.1)  # the coordinator looks for newly enrolled devices once a second
    process = start_python(command, fleet.place / name)
    try:
        lines = _lines_of(fleet.place / f"{name}.out", updates + 1)
        return float(lines[0]), peak_rss_mb(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)


def _lines_of(output: Path, count: int) -> list[str]:
    deadline = time.monotonic() + DEADLINE_S
    while len(lines := output.read_text().split()) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(output.with_suffix(".err").read_text()[-2000:])
        time.sleep(POLL_S)
    return lines


def import_floor() -> tuple[float, float]:
    """CPU seconds and peak MB of a Python that imports numpy and onnxruntime and ends."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "floor"
        start_python(["-c", FLOOR], output).wait(DEADLINE_S)
        seconds, peak_mb = (output.with_name("floor.out")).read_text().split()
    return float(seconds), float(peak_mb)


def installed_mb() -> dict[str, float]:
    """MB of files by distribution: all that fedtide's own dependencies need, and our packages themselves."""
    sizes: dict[str, float] = {}
    wanted = list(importlib.metadata.requires("fedtide") or [])
    while wanted:
        requirement = Requirement(wanted.pop())
        name = requirement.name.lower().replace("_", "-")
        if name in sizes or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        distribution = importlib.metadata.distribution(name)
        files = (Path(str(file.locate())) for file in distribution.files or [])
        sizes[name] = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
        wanted += distribution.requires or []
    ours = ("fedtide", "edge_agent", "coordinator", "broker_config")
    sources = itertools.chain.from_iterable((HERE.parent / package).rglob("*.py") for package in ours)
    sizes["fedtide"] = sum(source.stat().st_size for source in sources) / 1e6
    return sizes


def steps_per_cpu_second(train: Callable[[], int], seconds: float) -> float:
    """Steps taken per CPU second of all threads."""
    steps, before = 0, own_cpu_seconds()
    while own_cpu_seconds() - before < seconds:
        steps += train()
    return steps / (own_cpu_seconds() - before)


def plan_epoch(plan_path: Path, dataset: Dataset) -> Callable[[], int]:
    """One epoch with the plan runtime; it gives the number of steps."""
    plan = digits.plan(plan_path)
    trainer, rng = Trainer(plan.plan), np.random.default_rng(0)
    return lambda: trainer.run_epochs(plan.initial, dataset, digits.TRAINING, rng).steps


def torch_epoch(dataset: Dataset) -> Callable[[], int]:
    """The same with torch, eager, one thread."""
    torch.set_num_threads(1)
    model = digits.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=digits.TRAINING.learning_rate)
    loss_of = torch.nn.CrossEntropyLoss()
    images, labels = (torch.from_numpy(array) for array in dataset.arrays)
    generator = torch.Generator().manual_seed(0)
    batch = digits.TRAINING.batch_size

    def epoch() -> int:
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels), batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            loss_of(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        return math.ceil(len(labels) / batch)

    return epoch


def main() -> None:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="agents started, one after the other")
    parser.add_argument("--updates", type=int, default=20, help="of each agent, before its memory is read")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="on a real disk, not tmpfs"
    )
    parser.add_argument("--plan", type=Path, help="keep the built plan here for the next run")
    options = parser.parse_args()
    data = digits.split_digits(devices=1, concentration=1.0, seed=0)
    with tempfile.TemporaryDirectory(prefix="device-footprint-", dir=options.directory) as name:
        place = Path(name)
        plan_path = (options.plan or place / "digits.plan").resolve()
        digits.plan(plan_path)
        settings = COORDINATOR.format(plan=plan_path)
        with running_fleet(place, settings, data.held_out, {}) as fleet:
            start_up(fleet, "agent-warm-up", data.devices[0], updates=1)  # compiles bytecode, as pip would
            starts = [
                (*start_up(fleet, f"agent-{run}", data.devices[0], options.updates), *import_floor())
                for run in range(options.runs)
            ]
        epochs = plan_epoch(plan_path, data.devices[0]), torch_epoch(data.devices[0])
        rates = [[steps_per_cpu_second(epoch, 0.5) for epoch in epochs] for _ in range(5)]
    cpu_s, rss_mb, floor_cpu_s, floor_rss_mb = (
        statistics.median(column) for column in zip(*starts, strict=True)
    )
    plan_rate, torch_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    sizes = installed_mb()
    print_report(
        "an edge agent fits a small machine",
        [
            Target("peak RSS, MB", rss_mb, 85.0),
            Target("CPU s from process start to the first training", cpu_s, 0.4),
            Target("installed, MB", sum(sizes.values()), 170.0),
            Target("steps per CPU s, plan runtime / torch eager", plan_rate / torch_rate, 1.0, at_most=False),
        ],
        floor="a Python process that imports numpy and onnxruntime",
        floor_cpu_s=floor_cpu_s,
        floor_rss_mb=floor_rss_mb,
        peers=PEERS,
        steps_per_cpu_s={"plan runtime": plan_rate, "torch eager": torch_rate},
        installed_mb=sizes,
        starts=[
            dict(zip(("cpu_s", "rss_mb", "floor_cpu_s", "floor_rss_mb"), s, strict=True)) for s in starts
        ],
    )


if __name__ == "__main__":
    main()
