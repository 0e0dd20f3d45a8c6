"""Claim: persons' phones learn activities together, asynchronously, well enough for persons never seen.

Every person of the archive is a device; those of its array ``test_subjects`` are none, and the accuracy is
theirs. The task is ``docs/examples/activity.py``: raw windows of 9 × 128 readings, the log power behind one
layer of trained filters, fixed statistics of the window, a linear layer; its scales are constants, and its
initial parameters the same for every seed. All devices run over a real broker beside the real coordinator
process, each at a pace of its own by the size of its data, so that updates are stale. They train one after
the other in this process.

Counted: the accuracy after exactly ``--updates`` applied updates (300), whatever it was before or became
later: the journal is replayed to that update. One run a seed; a seed decides the paces and the order of
examples.

The recipe (model, epochs, learning rate, aggregator) was chosen by leaving out a third of the training
persons at a time; the test persons took no part in the choice.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from report import Target, print_report

from broker_config.local import LocalBroker, start_local_broker
from coordinator.model_state import ModelState, initial_state
from coordinator.plan.build import build
from coordinator.plan.file import BuiltPlan, load, save
from coordinator.plan.task import load_task
from coordinator.recovery import recover
from coordinator.replay import replay
from coordinator.settings import Rules
from coordinator.status import Status
from coordinator.status import read as read_status
from edge_agent.data_sources import Npz
from edge_agent.dataset import Dataset
from edge_agent.plan_evaluation import Evaluator
from edge_agent.settings import AgentSettings
from edge_agent.simulation import SimulatedDevice, SimulatedFleet
from fedtide.fleet_directory import FleetDirectory, NewFleet, create
from fedtide.wire.ids import DeviceId, FleetId, ModelVersion
from fedtide.wire.link import Broker
from fedtide.wire.parameters import Vector
from fedtide.wire.signatures import SigningKey

TASK: Final = Path(__file__).resolve().parent.parent / "docs" / "examples" / "activity.py"
FLEET: Final = FleetId("activity")
ACCURACY: Final = 0.94
START_WITHIN_S: Final = 60.0
RULES: Final = """\
fleet = "{fleet}"
plan = "{plan}"
broker.hosts = ["{broker}"]
aggregator = {{ kind = "fedasync", mixing = 0.1 }}
staleness.kind = "constant"
publish.min_interval_s = 1.0
update.codec = "q8"
evaluation = {{ data = "{held_out}", every_versions = 10 }}
stop.updates = {updates}
"""


@dataclass(frozen=True)
class Persons:
    """The archive: one dataset for each person who trains, and one of all others."""

    devices: tuple[Dataset, ...]
    unseen: Dataset
    unseen_persons: int


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        seed: of paces and orders.
        accuracy: on the unseen persons after exactly the updates asked for.
        accuracies: on the way there, by version, every tenth.
        seconds: from the coordinator's start to its stop.
        updates: applied in all.
        mean_staleness: of the applied ones, in versions.
        uplink_bytes: MQTT PUBLISH packets of all devices.
        downlink_bytes: to all devices.
        parameters: of the model.
    """

    seed: int
    accuracy: float
    accuracies: dict[int, float]
    seconds: float
    updates: int
    mean_staleness: float
    uplink_bytes: int
    downlink_bytes: int
    parameters: int


def read_persons(path: Path) -> Persons:
    """Read the archive: x ``(windows, 9, 128)``, y, subject, test_subjects."""
    with np.load(path, allow_pickle=False) as archive:
        x, y = archive["x"].astype(np.float32), archive["y"].astype(np.int64)
        persons, unseen = archive["subject"], archive["test_subjects"]
    rows = [persons == person for person in np.unique(persons) if person not in unseen]
    held_out = np.isin(persons, unseen)
    return Persons(
        tuple(Dataset((x[mine],), y[mine]) for mine in rows),
        Dataset((x[held_out],), y[held_out]),
        len(unseen),
    )


def plan(path: Path) -> BuiltPlan:
    """The training plan: from ``path`` if it is there, else built and saved there."""
    if not path.exists():
        torch.set_num_threads(1)
        save(build(load_task(TASK)), path)
    return load(path)


def run(plan_path: Path, persons: Persons, seed: int, options: "Options") -> Run:
    """Run the fleet until the coordinator has applied the updates, then score that version."""
    with (
        tempfile.TemporaryDirectory(prefix="har-fleet-", dir=options.directory) as place,
        start_local_broker(Path(place) / "broker", options.broker) as broker,
    ):
        directory = _directory(Path(place) / "fleet", plan_path, persons, broker, options.updates)
        fleet = SimulatedFleet(_devices(directory, persons, broker, seed, options.seconds_per_update), seed)
        status = asyncio.run(_conduct(directory, fleet))
        parameters = _parameters_after(directory, options.updates)
        accuracy = Evaluator(load(plan_path).plan).evaluate(parameters, persons.unseen).metric
        assert accuracy is not None
        return Run(
            seed=seed,
            accuracy=accuracy,
            accuracies={point.version: point.metric or 0.0 for point in status.evaluations},
            seconds=status.seconds,
            updates=status.updates.applied,
            mean_staleness=sum(tau * count for tau, count in status.staleness.items())
            / sum(status.staleness.values()),
            uplink_bytes=sum(one.sent_bytes for one in fleet.traffic.values()),
            downlink_bytes=sum(one.received_bytes for one in fleet.traffic.values()),
            parameters=status.parameters,
        )


def _directory(
    path: Path, plan_path: Path, persons: Persons, broker: LocalBroker, updates: int
) -> FleetDirectory:
    address = f"{broker.host}:{broker.port}"
    directory, _ = create(path, NewFleet(fleet=FLEET, broker=address))
    held_out = path / "held-out.npz"
    np.savez(held_out, x=persons.unseen.inputs[0], y=persons.unseen.arrays[-1])
    directory.settings_file.write_text(
        RULES.format(
            fleet=FLEET, plan=plan_path.resolve(), broker=address, held_out=held_out, updates=updates
        )
    )
    return directory


def _devices(
    directory: FleetDirectory, persons: Persons, broker: LocalBroker, seed: int, seconds_per_update: float
) -> list[SimulatedDevice]:
    rng = np.random.default_rng([seed, 1])
    mean_examples = statistics.mean(len(dataset) for dataset in persons.devices)
    devices = []
    for number, dataset in enumerate(persons.devices):
        name, key = DeviceId(f"person-{number:02d}"), SigningKey.generate()
        (directory.roster / f"{name}.pub").write_text(f"{key.public}\n")
        state = directory.path / "devices" / name
        settings = AgentSettings(
            fleet=FLEET,
            device=name,
            coordinator_key=str(directory.key().public),
            key=state / "device.key",
            state=state,
            data=Npz(path=state / "examples.npz"),
            broker=Broker(hosts=(f"{broker.host}:{broker.port}",)),
        )
        pace_s = seconds_per_update * len(dataset) / mean_examples * float(rng.uniform(0.8, 1.2))
        devices.append(SimulatedDevice(settings, key, dataset, pace_s))
    return devices


async def _conduct(directory: FleetDirectory, fleet: SimulatedFleet) -> Status:
    """Run coordinator and devices until the coordinator stops by itself; its last status."""
    log_file = directory.path / "coordinator.log"
    with log_file.open("wb") as log:
        coordinator = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedtide", "coordinator", "run", "--dir", str(directory.path)),
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    devices = asyncio.create_task(fleet.run(), name="har.devices")
    ended = asyncio.create_task(coordinator.wait(), name="har.coordinator")
    try:
        await asyncio.wait([devices, ended], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if coordinator.returncode is None:
            coordinator.kill()
        devices.cancel()
        await asyncio.gather(devices, ended, return_exceptions=True)
    if coordinator.returncode != 0:
        raise RuntimeError(f"the coordinator failed:\n{log_file.read_text()[-2000:]}")
    return read_status(directory.status_file)


def _parameters_after(directory: FleetDirectory, updates: int) -> Vector:
    """Replay the journal from its beginning to the version that this many updates made."""
    settings = directory.settings()
    built = load(settings.plan)
    rules = Rules(aggregator=settings.aggregator, server_optimizer=settings.server_optimizer)
    made: dict[ModelVersion, Vector] = {}

    def keep(state: ModelState) -> None:
        made[state.version] = state.parameters

    recovered = recover(directory.state, settings, built)
    try:
        replay(
            recovered.journal,
            initial_state(built.initial, rules),
            0,
            schema=built.plan.manifest.schema,
            bases={ModelVersion(0): built.initial}.__getitem__,
            on_version=keep,
        )
    finally:
        recovered.close()
    return made[ModelVersion(updates // rules.aggregator.goal)]


class Options(argparse.Namespace):
    """The command line."""

    data: Path
    seeds: list[int]
    updates: int
    seconds_per_update: float
    broker: str | None
    directory: Path
    plan: Path | None


def _options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="har.npz: x, y, subject, test_subjects")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seconds-per-update", type=float, default=4.0, help="of a mean device, at least")
    parser.add_argument("--broker", choices=("mosquitto", "nats"), help="default: what is installed")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--plan", type=Path, help="keep the built plan here for the next run")
    return parser.parse_args(namespace=Options())


def main() -> None:
    """Measure and print the report."""
    options = _options()
    persons = read_persons(options.data)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        plan_path = options.plan or Path(scratch) / "activity.plan"
        plan(plan_path)
        runs = []
        began = time.monotonic()
        for seed in options.seeds:
            runs.append(run(plan_path, persons, seed, options))
            print(runs[-1], flush=True)
    accuracies = [one.accuracy for one in runs]
    print_report(
        "phones learn activities together, asynchronously, well enough for persons never seen",
        [Target("mean accuracy", statistics.mean(accuracies), ACCURACY, at_most=False)],
        counted=f"accuracy on {persons.unseen_persons} unseen persons after {options.updates} updates",
        data=options.data.name,
        devices=len(persons.devices),
        lowest_accuracy=min(accuracies),
        accuracies=accuracies,
        settings=[line.format() for line in RULES.splitlines()[3:7]],
        wall_s=time.monotonic() - began,
        runs=[asdict(one) for one in runs],
    )


if __name__ == "__main__":
    main()
