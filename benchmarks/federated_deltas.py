"""Real asynchronous runs in virtual time: the devices' training and the coordinator's arithmetic, no broker.

From them come the deltas that the codec benchmarks measure on. Sixteen devices are at work at any time. A
device takes a time of its own, lognormal, times a little chance; when it is done, its update is folded by
FedBuff with its staleness weight, it goes to the end of the queue, and the next of the queue begins on the
newest version. Training is onnxruntime's on the plan that devices get.

As a script: runs tasks with float32 deltas and writes some of them to archives, with the tensors' names and
shapes as JSON:

    python benchmarks/federated_deltas.py DIRECTORY --tasks digits-cnn
"""

import argparse
import heapq
import json
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from federated_tasks import TASKS, FederatedTask, Fleet
from report import own_cpu_seconds

from coordinator.aggregation import FedBuff
from coordinator.model_state import ModelState, fold_update, initial_state
from coordinator.server_optimizers import SGD
from coordinator.settings import Rules
from coordinator.staleness import Polynomial
from edge_agent.plan_runtime import Evaluator, LocalResult, Trainer
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, TensorSpec, Vector
from fedtide.wire.training import Training

AT_WORK: Final = 16
GOAL: Final = 8
RULES: Final = Rules(
    aggregator=FedBuff(goal=GOAL, normalise_staleness=True), server_optimizer=SGD(learning_rate=1.0)
)
STALENESS: Final = Polynomial(exponent=0.5)
EVALUATE_EVERY: Final = 2 * GOAL
PLANS: Final = Path(tempfile.gettempdir()) / "fedtide-benchmark-plans"
"""Built plans are kept here from run to run."""
LATE: Final = 16
MIDDLE: Final = 8
"""How many deltas are taken from a run."""
ADAM_RATE: Final = 0.001
_SPREAD: Final = 0.6
_CHANCE: Final = 0.2


@dataclass(frozen=True)
class Update:
    """What a device has just trained.

    Attributes:
        number: of the update in this run, from 1, in the order of arrival.
        device: its number.
        delta: local − base.
        result: of the training.
        base_version: the version it began on.
    """

    number: int
    device: int
    delta: Vector
    result: LocalResult
    base_version: ModelVersion


Uplink = Callable[[Update], Vector]
"""What reaches the coordinator of an update; whoever gives it counts the bytes."""

Downlink = Callable[[ModelVersion, Vector], Vector]
"""What devices hold of a version, from its parameters."""


@dataclass(frozen=True)
class Point:
    """One evaluation: after so many updates, the accuracy on the held-out examples."""

    updates: int
    accuracy: float


@dataclass
class Course:
    """One run.

    Attributes:
        points: evaluations, in order.
        staleness: of every update, in versions.
        training_cpu_s: of every local training.
    """

    points: list[Point] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    training_cpu_s: list[float] = field(default_factory=list)


class Run:
    """A task made ready: data read, plan built, sessions open. Can be run again and again."""

    def __init__(self, task: FederatedTask, data: Path) -> None:
        self.task = task
        self.fleet: Fleet = task.read(data)
        self.built = task.plan(PLANS)
        self.schema = self.built.plan.manifest.schema
        self._trainer = Trainer(self.built.plan)
        self._evaluator = Evaluator(self.built.plan)

    def accuracy(self, parameters: Vector) -> float:
        """On the held-out examples."""
        metric = self._evaluator.evaluate(parameters, self.fleet.held_out, batch_size=500).metric
        assert metric is not None
        return metric

    def conduct(
        self,
        seed: int,
        updates: int,
        uplink: Uplink,
        training: Training | None = None,
        downlink: Downlink = lambda _version, parameters: parameters,
    ) -> Course:
        """Apply so many updates; evaluate after every ``EVALUATE_EVERY``.

        Args:
            seed: of paces, turns and the order of examples. The initial parameters are always the same.
            updates: in all.
            uplink: what becomes of a delta on its way.
            training: how devices train; None: as the task says.
            downlink: what devices hold of a version; asked whenever one begins.
        """
        training = training or self.task.training
        course, rng = Course(), np.random.default_rng([seed, 2])
        state = initial_state(self.built.initial.copy(), RULES)
        at_work = _AtWork(len(self.fleet.devices), np.random.default_rng([seed, 1]))
        for _ in range(min(AT_WORK, len(self.fleet.devices))):
            at_work.begin(_Base.of(state, downlink))
        for number in range(1, updates + 1):
            device, base = at_work.next_done()
            before = own_cpu_seconds()
            result = self._trainer.run_epochs(
                base.parameters, self.fleet.devices[device], training, rng, version=base.version
            )
            course.training_cpu_s.append(own_cpu_seconds() - before)
            staleness = state.version - base.version
            weight = STALENESS.weight(staleness)
            assert weight is not None  # no bound is set
            delta: Vector = np.subtract(result.parameters, base.parameters)
            received = uplink(Update(number, device, delta, result, base.version))
            state = fold_update(state, received, weight, 1.0, None)
            course.staleness.append(staleness)
            if number % EVALUATE_EVERY == 0:
                course.points.append(Point(number, self.accuracy(state.parameters)))
            at_work.begin(_Base.of(state, downlink))
        return course


@dataclass(frozen=True, eq=False)
class _Base:
    """The version a device began on."""

    version: ModelVersion
    parameters: Vector

    @staticmethod
    def of(state: ModelState, downlink: Downlink) -> "_Base":
        return _Base(state.version, downlink(state.version, state.parameters))


class _AtWork:
    """Who is training, until when, and from which version; the others stand in a queue."""

    def __init__(self, devices: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self._paces = rng.lognormal(0.0, _SPREAD, devices)
        self._queue = deque(rng.permutation(devices).tolist())
        self._until: list[tuple[float, int, _Base]] = []
        self._now = 0.0

    def begin(self, base: _Base) -> None:
        """The first of the queue begins on this version."""
        device = self._queue.popleft()
        took = self._paces[device] * self._rng.lognormal(0.0, _CHANCE)
        heapq.heappush(self._until, (self._now + took, device, base))

    def next_done(self) -> tuple[int, _Base]:
        """The device that is done next, with the version it began on; it joins the queue."""
        self._now, device, base = heapq.heappop(self._until)
        self._queue.append(device)
        return device, base


@dataclass(frozen=True)
class Deltas:
    """Deltas taken from one run.

    Attributes:
        middle: of different devices, from the first half of the run, float32 ``(count, size)``.
        late: the same from its end.
        schema: of the model.
        training_cpu_ms: of a local training, median.
    """

    middle: npt.NDArray[np.float32]
    late: npt.NDArray[np.float32]
    schema: Schema
    training_cpu_ms: float

    def save(self, path: Path) -> None:
        """Write an archive."""
        tensors = [(tensor.name, tensor.shape) for tensor in self.schema.tensors]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            deltas=self.late,
            middle=self.middle,
            tensors=json.dumps(tensors),
            training_cpu_ms=self.training_cpu_ms,
        )

    @staticmethod
    def load(path: Path) -> "Deltas":
        """Read an archive."""
        with np.load(path, allow_pickle=False) as archive:
            tensors = json.loads(str(archive["tensors"]))
            schema = Schema(
                tensors=tuple(
                    TensorSpec(name=name, dtype="float32", shape=tuple(shape)) for name, shape in tensors
                )
            )
            return Deltas(archive["middle"], archive["deltas"], schema, float(archive["training_cpu_ms"]))


def collect(run: Run, updates: int, seed: int = 0) -> Deltas:
    """Run with float32 deltas; keep the last ones, and some from two fifths of the way, of different devices.

    Args:
        run: the task.
        updates: in all.
        seed: of the run.
    """
    found: dict[str, dict[int, Vector]] = {"middle": {}, "late": {}}

    def keep(update: Update) -> Vector:
        if update.number > int(0.4 * updates) and len(found["middle"]) < MIDDLE:
            found["middle"].setdefault(update.device, update.delta)
        if update.number > updates - 2 * LATE and len(found["late"]) < LATE:
            found["late"].setdefault(update.device, update.delta)
        return update.delta

    course = run.conduct(seed, updates, keep)
    return Deltas(
        np.stack([*found["middle"].values()]),
        np.stack([*found["late"].values()]),
        run.schema,
        1000 * float(np.median(course.training_cpu_s)),
    )


def adam(task: FederatedTask) -> FederatedTask:
    """The same task with Adam on the devices, its learning rate 0.001, its state fresh for every update."""
    training = msgspec.structs.replace(task.training, learning_rate=ADAM_RATE)
    return replace(task, name=f"{task.name}-adam", optimizer="adam", training=training)


def deltas_of(
    task: FederatedTask, data: Path, directory: Path | None, updates: int | None = None, seed: int = 0
) -> Deltas:
    """A task's deltas: from the directory if they are there, else from a run, and then kept there."""
    updates = updates or task.updates
    name = task.name if updates == task.updates else f"{task.name}-{updates}"
    if seed:
        name += f"-seed{seed}"
    path = directory / f"{name}.npz" if directory else None
    if path and path.exists():
        return Deltas.load(path)
    deltas = collect(Run(task, data), updates, seed)
    if path:
        deltas.save(path)
    return deltas


class Options(argparse.Namespace):
    """The command line."""

    directory: Path
    tasks: list[str]
    data: Path


def _options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where to write TASK.npz")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), required=True)
    parser.add_argument("--data", type=Path, default=Path(), help="directory with har.npz and mnist.npz")
    return parser.parse_args(namespace=Options())


def main() -> None:
    """Run and write the archives."""
    options = _options()
    for name in options.tasks:
        deltas = deltas_of(TASKS[name], options.data, options.directory)
        print(f"{name}: {len(deltas.late)} late deltas of {deltas.schema.size:,} parameters", flush=True)


if __name__ == "__main__":
    main()
