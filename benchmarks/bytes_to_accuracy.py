"""Claim: a fleet learns as well from 1/400 of the bytes that float32 deltas take, in about as many updates.

Real asynchronous runs (``federated_deltas``): every delta is encoded, decoded and only then folded, and what
a codec leaves out is carried to the device's next update by the same arithmetic as on a device. Codecs of a
rate get a step in units of the delta's rms.

A run has two phases. In the first the learning rate is constant; counted are the updates and the uplink's
bytes until the mean of the last five evaluations reaches 98 % of what it is at the end of that phase with
float32 and the same seed. In the second, a quarter as long, the learning rate is a tenth; its last five
evaluations are the final accuracy. Payloads and whole envelopes are counted, the latter with their signature
and header. Medians over the seeds; a seed decides paces, turns and the order of examples.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec
from federated_deltas import GOAL, Run
from federated_tasks import TASKS, available
from report import Target, print_report
from uplink_methods import METHODS, REFERENCE, Uplink

from fedtide.wire.training import StepDecay, Training

FIRST_PHASES: Final[Mapping[str, int]] = {"digits-cnn": 1600}
"""Updates of the first phase where a task's own are too few for float32 to level off."""
CLAIMED: Final = "lowrank 8"
TARGET_SHARE: Final = 0.98
MEAN_OF: Final = 5
SECOND_PHASE: Final = 0.25
SECOND_RATE: Final = 0.1
RATIOS: Final[Mapping[str, float]] = {
    "digits-mlp": 150.0,
    "digits-cnn": 400.0,
    "activity-cnn": 400.0,
    "mnist-mlp": 400.0,
    "mnist-crowd": 400.0,
}
"""Of float32's payload bytes to those of the claimed codec, at least."""
UPDATES_RATIO: Final = 1.15
ACCURACY_LOST: Final = 0.003


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        task: its name.
        method: its name.
        seed: of the run.
        first_phase: updates in it.
        accuracies: by number of updates applied.
        payload_bytes: sent until then, by number of updates.
        envelope_bytes: the same with header and signature.
        encode_cpu_ms: median, with error feedback and decoding.
        training_cpu_ms: median of the local trainings.
    """

    task: str
    method: str
    seed: int
    first_phase: int
    accuracies: dict[int, float]
    payload_bytes: dict[int, float]
    envelope_bytes: dict[int, float]
    encode_cpu_ms: float
    training_cpu_ms: float

    def smoothed(self, *, first_phase: bool = True) -> dict[int, float]:
        """Means of the last five evaluations, by updates, of one phase."""
        points = [(n, a) for n, a in self.accuracies.items() if (n <= self.first_phase) == first_phase]
        accuracies = [accuracy for _, accuracy in points]
        return {
            points[end - 1][0]: statistics.mean(accuracies[end - MEAN_OF : end])
            for end in range(MEAN_OF, len(points) + 1)
        }

    @property
    def plateau(self) -> float:
        """At the end of the first phase."""
        return list(self.smoothed().values())[-1]

    @property
    def final(self) -> float:
        """At the end of the second."""
        return list(self.smoothed(first_phase=False).values())[-1]

    def updates_until(self, accuracy: float) -> int | None:
        """In the first phase; None: it was not reached."""
        return next((n for n, reached in self.smoothed().items() if reached >= accuracy), None)


def two_phases(training: Training, first_phase: int) -> Training:
    """The learning rate falls to a tenth at the version that ends the first phase."""
    decay = StepDecay(every_versions=first_phase // GOAL, by=SECOND_RATE)
    return msgspec.structs.replace(training, schedule=decay)


def conduct(run: Run, name: str, seed: int, first_phase: int) -> Outcome:
    """One run of one method."""
    uplink = Uplink(METHODS[name], run.schema, first_phase)
    updates = first_phase + int(SECOND_PHASE * first_phase)
    course = run.conduct(seed, updates, uplink, two_phases(run.task.training, first_phase))
    at = [point.updates for point in course.points]
    return Outcome(
        task=run.task.name,
        method=name,
        seed=seed,
        first_phase=first_phase,
        accuracies={point.updates: point.accuracy for point in course.points},
        payload_bytes={number: uplink.payload_bytes[number] for number in at},
        envelope_bytes={number: uplink.envelope_bytes[number] for number in at},
        encode_cpu_ms=1000 * statistics.median(uplink.cpu_s),
        training_cpu_ms=1000 * statistics.median(course.training_cpu_s),
    )


@dataclass(frozen=True)
class Comparison:
    """One method against float32, medians over the seeds.

    Attributes:
        updates: until the target; None: half of the runs or more did not reach it.
        updates_ratio: to float32's.
        payload_bytes: until the target.
        bytes_ratio: float32's payload bytes to these.
        envelope_ratio: the same of whole envelopes.
        bits_per_parameter: of a payload, over the whole run.
        final_accuracy: of the second phase.
        accuracy_lost: float32's final accuracy less this.
        reached: how many runs of how many reached the target.
    """

    updates: float | None
    updates_ratio: float | None
    payload_bytes: float | None
    bytes_ratio: float | None
    envelope_ratio: float | None
    bits_per_parameter: float
    final_accuracy: float
    accuracy_lost: float
    reached: str


def compare(outcomes: Sequence[Outcome], references: Sequence[Outcome], parameters: int) -> Comparison:
    """Compare runs of one method with those of float32 with the same seeds."""
    by_seed = {reference.seed: reference for reference in references}
    pairs = [(one, by_seed[one.seed]) for one in outcomes]
    reached = [_until(one, reference) for one, reference in pairs]
    updates, updates_ratio, sent, bytes_ratio, envelope_ratio = (
        _median_or_none(column) for column in zip(*reached, strict=True)
    )
    totals = [list(one.payload_bytes.items())[-1] for one in outcomes]
    return Comparison(
        updates=updates,
        updates_ratio=updates_ratio,
        payload_bytes=sent,
        bytes_ratio=bytes_ratio,
        envelope_ratio=envelope_ratio,
        bits_per_parameter=statistics.median(8 * size / number / parameters for number, size in totals),
        final_accuracy=statistics.median(one.final for one in outcomes),
        accuracy_lost=statistics.median(reference.final - one.final for one, reference in pairs),
        reached=f"{sum(row[0] < math.inf for row in reached)} of {len(reached)}",
    )


def _until(one: Outcome, reference: Outcome) -> tuple[float, ...]:
    """Updates, their ratio, payload bytes, both ratios of bytes: until the target, or as bad as can be."""
    accuracy = TARGET_SHARE * reference.plateau
    updates, needed = one.updates_until(accuracy), reference.updates_until(accuracy)
    assert needed is not None
    if updates is None:
        return math.inf, math.inf, math.inf, 0.0, 0.0
    return (
        updates,
        updates / needed,
        one.payload_bytes[updates],
        reference.payload_bytes[needed] / one.payload_bytes[updates],
        reference.envelope_bytes[needed] / one.envelope_bytes[updates],
    )


def _median_or_none(figures: Sequence[float]) -> float | None:
    """The median; None where half of the runs or more did not get so far."""
    median = statistics.median(figures)
    return median if 0 < median < math.inf else None


def print_row(name: str, one: Comparison) -> None:
    """For people: one method."""
    if one.updates is None or one.payload_bytes is None:
        figures = "not reached".ljust(50)
    else:
        figures = (
            f"{one.updates:6.0f} updates ({one.updates_ratio:4.2f} ×) {one.payload_bytes:13,.0f} B"
            f"  1/{one.bytes_ratio:<6.0f} 1/{one.envelope_ratio:<6.0f}"
        )
    print(
        f"  {name:20} {figures} {one.bits_per_parameter:7.3f} bit  final {one.final_accuracy:.4f} "
        f"({-one.accuracy_lost:+.4f}), reached by {one.reached}",
        flush=True,
    )


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy against the uplink's bytes, a panel for each task, the first seed."""
    import matplotlib as mpl  # noqa: PLC0415  (half a second that only --plot needs)

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    tasks = list(dict.fromkeys(one.task for one in outcomes))
    figure, panels = plt.subplots(1, len(tasks), figsize=(5.0 * len(tasks), 4.2), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        of_task = [one for one in outcomes if one.task == task]
        for one in (one for one in of_task if one.seed == of_task[0].seed):
            means = {**one.smoothed(), **one.smoothed(first_phase=False)}
            panel.plot(
                [one.payload_bytes[number] for number in means],
                list(means.values()),
                linewidth=2.0 if one.method == CLAIMED else 1.0,
                label=one.method,
            )
        reference = next(one for one in of_task if one.method == REFERENCE)
        panel.axhline(TARGET_SHARE * reference.plateau, color="grey", linewidth=0.6, linestyle=":")
        panel.set(xscale="log", xlabel="payload bytes of all updates so far")
        panel.set_title(task, fontsize=10)
        panel.grid(visible=True, which="major", linewidth=0.3)
    panels[0][0].set_ylabel(f"accuracy, mean of {MEAN_OF} evaluations")
    panels[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


class _Kept:
    """Runs made before, one JSON object a line, so that a long comparison can be made in parts."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._outcomes = [msgspec.json.decode(line, type=Outcome) for line in lines]

    def find(self, task: str, method: str, seed: int, first_phase: int) -> Outcome | None:
        """The run, if it was made."""
        wanted = (task, method, seed, first_phase)
        found = (o for o in self._outcomes if (o.task, o.method, o.seed, o.first_phase) == wanted)
        return next(found, None)

    def add(self, outcome: Outcome) -> None:
        """Keep a run."""
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")


class Options(argparse.Namespace):
    """The command line."""

    data: Path | None
    tasks: list[str] | None
    methods: list[str]
    seeds: list[int]
    first_phase: int | None
    keep: Path | None
    plot: Path | None
    quick: bool


def _options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory with har.npz and mnist.npz; else digits only")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=[REFERENCE, "top-k 1 %", CLAIMED]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--first-phase", type=int, help="updates; default: as the task says")
    parser.add_argument("--keep", type=Path, help="add runs to this file, and make none that is in it again")
    parser.add_argument("--plot", type=Path, help="write accuracy against bytes here (.png)")
    parser.add_argument("--quick", action="store_true", help="digits-mlp only")
    return parser.parse_args(namespace=Options())


def main() -> None:
    """Run and print the report."""
    options = _options()
    began = time.monotonic()
    kept, outcomes = _Kept(options.keep), []
    table: dict[str, dict[str, Comparison]] = {}
    for task_name in options.tasks or (["digits-mlp"] if options.quick else available(options.data)):
        run = Run(TASKS[task_name], options.data or Path())
        first_phase = options.first_phase or FIRST_PHASES.get(task_name, run.task.updates)
        print(f"\n{task_name}: {run.schema.size:,} parameters", flush=True)
        references: list[Outcome] = []
        table[task_name] = {}
        for method in dict.fromkeys([REFERENCE, *options.methods]):
            of_method = []
            for seed in options.seeds:
                outcome = kept.find(task_name, method, seed, first_phase)
                if outcome is None:
                    outcome = conduct(run, method, seed, first_phase)
                    kept.add(outcome)
                of_method.append(outcome)
            references = references or of_method
            table[task_name][method] = compare(of_method, references, run.schema.size)
            print_row(method, table[task_name][method])
            outcomes += of_method
    if options.plot:
        plot(outcomes, options.plot)
    print_report(
        "a fleet learns as well from 1/400 of the bytes of float32 deltas, in about as many updates",
        [target for task, rows in table.items() for target in _targets(task, rows)],
        seeds=options.seeds,
        claimed=CLAIMED,
        target_share=TARGET_SHARE,
        comparisons={task: {name: asdict(one) for name, one in rows.items()} for task, rows in table.items()},
        cpu_ms={
            one.task: {other.method: other.encode_cpu_ms for other in outcomes if other.task == one.task}
            | {"training": one.training_cpu_ms}
            for one in outcomes
        },
        wall_s=time.monotonic() - began,
    )


def _targets(task: str, rows: Mapping[str, Comparison]) -> list[Target]:
    one = rows.get(CLAIMED)
    if one is None:
        return []
    return [
        Target(f"float32's bytes to ours, {task}", one.bytes_ratio, RATIOS[task], at_most=False),
        Target(f"updates to float32's, {task}", one.updates_ratio, UPDATES_RATIO),
        Target(f"final accuracy lost, {task}", one.accuracy_lost, ACCURACY_LOST),
    ]


if __name__ == "__main__":
    main()
