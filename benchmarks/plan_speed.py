"""Claim: a training plan trains small models faster than torch does, in a process too small for torch.

For each kind of model in docs/examples/models.py, one thread, batches of 32, SGD with momentum (or AdamW):
steps per CPU second of the device's own ``Trainer`` and of torch eager, in this process, taking turns; the
ratio is the median of the turns, each of them updates of 32 steps on 128 examples. In fresh processes
without torch: peak resident memory over some steps, and CPU seconds from the start of the process to the end
of the first step. In a fresh process with torch imported: CPU seconds of ``build``, everything that the first
use of torch's exporter loads included. And the bytes of the signed plan.

The floor of a step is its multiply-adds (matrix products and convolutions, forward and backward, as torch
counts them) at the rate that one large float32 matrix product reaches in the same run. Small models cannot
come near it, since their operands are small; the figure says how much is left. The floor of memory and
start-up is Python importing numpy and onnxruntime.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from device_footprint import import_floor
from report import Target, own_cpu_seconds, print_report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coordinator.plan.build import build
from coordinator.plan.file import BuiltPlan, load, save
from coordinator.plan.task import Task
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Trainer
from fedtide.wire.plan import seal_plan
from fedtide.wire.signatures import SigningKey
from fedtide.wire.training import Training

HERE: Final = Path(__file__).resolve().parent
BATCH: Final = 32
BATCHES: Final = 4
EPOCHS: Final = 8
"""32 steps, as many as a device with 128 examples would take for one update."""
TRAINING: Final = Training(local_epochs=EPOCHS, batch_size=BATCH, learning_rate=1e-3)
SECONDS: Final = 0.3
"""CPU seconds of one turn."""
CHILD_DEADLINE_S: Final = 600

RATIO_AT_LEAST: Final = {
    "MLP": 3.0,
    "dense autoencoder": 3.0,
    "LeNet": 1.0,
    "1-D CNN": 1.5,
    "depthwise CNN": 0.9,
    "LSTM": 1.0,
    "transformer": 1.5,
}
RECURRENT: Final = frozenset({"GRU", "LSTM"})
MAX_RSS_MB: Final = 100.0
MAX_RSS_MLP_MB: Final = 85.0
MAX_FIRST_STEP_CPU_S: Final = 0.4
MAX_SEALED_BYTES: Final = 10_000
MAX_SEALED_RECURRENT_BYTES: Final = 64_000
MAX_BUILD_CPU_S: Final = 15.0
MAX_BUILD_RECURRENT_CPU_S: Final = 45.0

DEVICE: Final = """
import sys, time
from pathlib import Path
import numpy as np
from coordinator.plan.file import load
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Trainer
from fedtide.wire.training import Training

built, arrays = load(Path(sys.argv[1])), np.load(sys.argv[2])
inputs = tuple(arrays[f"x{index}"] for index in range(len(built.plan.manifest.inputs)))
dataset = Dataset(inputs, arrays["y"] if "y" in arrays else None)
trainer, rng = Trainer(built.plan), np.random.default_rng(0)
trainer.run_epochs(built.initial, dataset, Training(learning_rate=1e-3, max_steps=1), rng)
first_step = time.process_time()
trainer.run_epochs(built.initial, dataset, Training(learning_rate=1e-3, local_epochs=25), rng)
assert "torch" not in sys.modules
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(first_step, int(peak) * 1024 / 1e6)
"""


def example_models() -> ModuleType:
    """docs/examples/models.py, which is no package."""
    path = HERE.parent / "docs" / "examples" / "models.py"
    specification = importlib.util.spec_from_file_location("example_models", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """One kind of model with its example batch, from seed 0, and the optimizer built on it."""

    name: str
    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    targets: torch.Tensor | None
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer

    @property
    def task(self) -> Task:
        """What the plan is built from."""
        metric = None if self.targets is None else "accuracy"
        example = (self.inputs, self.targets)
        return Task(self.model, self.loss, self.optimizer, example, self.name, metric)  # type: ignore[arg-type]

    def dataset(self) -> Dataset:
        """As many examples as an epoch has: the example batch, repeated."""
        inputs = tuple(np.concatenate([tensor.numpy()] * BATCHES) for tensor in self.inputs)
        targets = None if self.targets is None else np.concatenate([self.targets.numpy()] * BATCHES)
        return Dataset(inputs, targets)


def make_case(name: str, optimizer: str) -> Case:
    """The family of this name; ``optimizer`` is ``momentum`` or ``adamw``."""
    family = next(family for family in example_models().FAMILIES if family.name == name)
    torch.manual_seed(0)
    model, inputs, targets, loss = family.make()
    parameters = model.parameters()
    made: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, lr=1e-3)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    )
    return Case(name, model, inputs, targets, loss, made)


def build_plan(name: str, optimizer: str, path: Path) -> float:
    """Build a family's plan, save it, and return the CPU seconds of ``build``. For a fresh process."""
    torch.set_num_threads(1)
    task = make_case(name, optimizer).task
    before = own_cpu_seconds()
    built = build(task)
    seconds = own_cpu_seconds() - before
    save(built, path)
    return seconds


def in_fresh_process(function: Callable[..., float], *arguments: Any) -> float:
    """Call a function of this file in a process of its own, which has imported what this file imports."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result(CHILD_DEADLINE_S)


def plan_update(built: BuiltPlan, dataset: Dataset) -> Callable[[], int]:
    """Training for one update as a device does it; it gives the number of steps."""
    trainer, rng = Trainer(built.plan), np.random.default_rng(0)
    return lambda: trainer.run_epochs(built.initial, dataset, TRAINING, rng).steps


def torch_update(case: Case, dataset: Dataset) -> Callable[[], int]:
    """The same with torch, eager."""
    tensors = tuple(torch.from_numpy(array) for array in dataset.arrays)
    generator = torch.Generator().manual_seed(0)
    case.model.train()

    def update() -> int:
        for _ in range(EPOCHS):
            order = torch.randperm(len(dataset), generator=generator)
            for start in range(0, len(order), BATCH):
                step(case, [tensor[order[start : start + BATCH]] for tensor in tensors])
        return EPOCHS * BATCHES

    return update


def step(case: Case, batch: Sequence[torch.Tensor]) -> None:
    """One step of torch, eager; without targets the loss takes the input."""
    case.optimizer.zero_grad()
    output = case.model(*batch[: len(case.inputs)])
    loss = case.loss(output, batch[0] if case.targets is None else batch[-1])
    loss.backward()  # type: ignore[no-untyped-call]
    case.optimizer.step()


def multiply_adds(case: Case) -> int:
    """Of one step, in matrix products and convolutions; recurrent layers as the products they consist of."""
    tensors = case.inputs if case.targets is None else (*case.inputs, case.targets)
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")  # on processors that this one is not
        with torch.backends.mkldnn.flags(enabled=False):  # whose fused LSTM the counter does not know
            step(case, tensors)
    return int(counter.get_total_flops()) // 2


def cpu_seconds_each(work: Callable[[], int], seconds: float) -> float:
    """CPU seconds of one step, all threads, over at least ``seconds``."""
    steps, before = 0, own_cpu_seconds()
    while (spent := own_cpu_seconds() - before) < seconds:
        steps += work()
    return spent / steps


def product_rate(seconds: float) -> float:
    """Multiply-adds per CPU second of a float32 matrix product, 512×512 by 512×512."""
    left, right = torch.ones(512, 512), torch.ones(512, 512)

    def products() -> int:
        torch.mm(left, right)
        return 1

    return 512**3 / cpu_seconds_each(products, seconds)


def start_device(plan: Path, examples: Path) -> tuple[float, float]:
    """CPU seconds to the end of the first step, and peak MB, of a fresh process without torch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    ended = subprocess.run(
        [sys.executable, "-c", DEVICE, str(plan), str(examples)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=CHILD_DEADLINE_S,
    )
    cpu_s, peak_mb = map(float, ended.stdout.split())
    return cpu_s, peak_mb


@dataclass(frozen=True)
class Figures:
    """What is measured of one family. Medians over the turns, where there are several.

    Attributes:
        ratio: steps per CPU second, plan / torch.
        plan_ms: CPU milliseconds of one step.
        torch_ms: the same.
        rss_mb: peak, 10⁶ bytes.
        first_step_cpu_s: from the start of the process.
        sealed_bytes: of the signed plan.
        build_cpu_s: None if the plan was there already.
        multiply_adds: of one step; torch counts a depthwise kernel's gradient as a whole kernel's, too high.
        part_of_floor: the floor's time divided by the plan's.
    """

    ratio: float
    plan_ms: float
    torch_ms: float
    rss_mb: float
    first_step_cpu_s: float
    sealed_bytes: int
    build_cpu_s: float | None
    multiply_adds: int
    part_of_floor: float


def measure(name: str, optimizer: str, runs: int, place: Path) -> Figures:
    """All figures of one family."""
    case = make_case(name, optimizer)
    plan_path = place / f"{name.replace(' ', '-').replace(',', '')}-{optimizer}.plan"
    build_cpu_s = None
    if not plan_path.exists():
        build_cpu_s = in_fresh_process(build_plan, name, optimizer, plan_path)
    built, dataset = load(plan_path), case.dataset()
    counted = multiply_adds(case)
    sides = plan_update(built, dataset), torch_update(case, dataset)
    for update in sides:
        update()
    turns = [[cpu_seconds_each(update, SECONDS) for update in sides] for _ in range(runs)]
    plan_s, torch_s = (statistics.median(column) for column in zip(*turns, strict=True))
    examples = plan_path.with_suffix(".npz")
    arrays: dict[str, Any] = {f"x{index}": array for index, array in enumerate(dataset.inputs)}
    if dataset.targets is not None:
        arrays["y"] = dataset.targets
    np.savez(examples, **arrays)
    start_device(plan_path, examples)  # compiles bytecode, as pip would
    starts = [start_device(plan_path, examples) for _ in range(runs)]
    first_step_cpu_s, rss_mb = (statistics.median(column) for column in zip(*starts, strict=True))
    return Figures(
        ratio=statistics.median(torch_turn / plan_turn for plan_turn, torch_turn in turns),
        plan_ms=plan_s * 1e3,
        torch_ms=torch_s * 1e3,
        rss_mb=rss_mb,
        first_step_cpu_s=first_step_cpu_s,
        sealed_bytes=len(seal_plan(built.plan, SigningKey.from_seed(bytes(32)))),
        build_cpu_s=build_cpu_s,
        multiply_adds=counted,
        part_of_floor=counted / product_rate(SECONDS) / plan_s,
    )


def targets_of(name: str, figures: Figures) -> list[Target]:
    """What a family is held to."""
    targets = [
        Target(f"{name}: peak RSS, MB", figures.rss_mb, MAX_RSS_MLP_MB if name == "MLP" else MAX_RSS_MB),
        Target(f"{name}: CPU s to the first step", figures.first_step_cpu_s, MAX_FIRST_STEP_CPU_S),
        Target(
            f"{name}: signed plan, bytes",
            float(figures.sealed_bytes),
            float(MAX_SEALED_RECURRENT_BYTES if name in RECURRENT else MAX_SEALED_BYTES),
        ),
    ]
    if figures.build_cpu_s is not None:
        most = MAX_BUILD_RECURRENT_CPU_S if name in RECURRENT else MAX_BUILD_CPU_S
        targets.append(Target(f"{name}: CPU s to build", figures.build_cpu_s, most))
    if name in RATIO_AT_LEAST:
        least = RATIO_AT_LEAST[name]
        targets.insert(0, Target(f"{name}: plan / torch", figures.ratio, least, at_most=False))
    return targets


def main() -> None:
    """Measure and print the report."""
    names = [family.name for family in example_models().FAMILIES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7, help="turns of each side, and processes started")
    parser.add_argument("--only", action="append", choices=names, help="this family; may be given repeatedly")
    parser.add_argument("--optimizer", choices=["momentum", "adamw"], default="momentum")
    parser.add_argument(
        "--plans", type=Path, help="keep the built plans here; those there are not built anew"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Figures] = {}
    floors = [import_floor() for _ in range(options.runs)]
    floor_cpu_s, floor_rss_mb = (statistics.median(column) for column in zip(*floors, strict=True))
    with tempfile.TemporaryDirectory(prefix="plan-speed-") as temporary:
        place = options.plans or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        for name in options.only or names:
            found[name] = measure(name, options.optimizer, options.runs, place)
            print(json.dumps({name: vars(found[name])}), file=sys.stderr, flush=True)
    print_report(
        "a training plan trains small models faster than torch eager, in a small process",
        [target for name, figures in found.items() for target in targets_of(name, figures)],
        floor="multiply-adds of a step at the rate of a 512×512 float32 matrix product; "
        "a Python process that imports numpy and onnxruntime; both in the same run",
        floor_cpu_s=floor_cpu_s,
        floor_rss_mb=floor_rss_mb,
        optimizer=options.optimizer,
        batch=BATCH,
        families={name: vars(figures) for name, figures in found.items()},
    )


if __name__ == "__main__":
    main()
