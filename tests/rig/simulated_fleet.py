"""A whole fleet in virtual time: real agents, the real coordinator, a broker in memory, and what fails.

    report = simulate(Scenario(seed=7), directory)

Everything is drawn from the one seed: a run that breaks a promise says so with the command that repeats it,

    python tests/rig/simulate.py --seed 7

After the faults the fleet has ``calm_s`` to come to rest; then the promises of DESIGN.md are checked.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from broker_memory import Limits, Message
from chaos import Chaos
from fleet_witness import Audit, PromiseBroken, Witness, audit
from little_training import PLAN
from memory_broker import MemoryBroker
from scenario import Report, Scenario
from simulated_disk import SimulatedDisk
from simulated_machines import (
    COORDINATOR,
    COORDINATOR_KEY,
    FLEET,
    CoordinatorMachine,
    DeviceMachine,
    settings_for,
)
from virtual_time import Killed, VirtualLoop, current_process

from coordinator import status
from coordinator.aggregation import FedAsync, FedBuff
from coordinator.recovery import recover
from coordinator.server_optimizers import SGD, Momentum
from coordinator.settings import CoordinatorSettings, Journal, Publish, Update
from edge_agent.settings import LocalTraining
from fedtide.wire.model_blob import ModelFormat
from fedtide.wire.steps import Step, listen


class Fleet:
    """All parts of one simulation.

    Attributes:
        machines: by name; the coordinator's too.
    """

    def __init__(self, scenario: Scenario, directory: Path, loop: VirtualLoop) -> None:
        self.scenario = scenario
        self.directory = directory
        self.loop = loop
        seeds = np.random.SeedSequence(scenario.seed).spawn(scenario.devices + 3)
        self.rng = np.random.default_rng(seeds[0])
        limits = scenario.limits or Limits(
            max_queued_messages=int(self.rng.choice([3, 1000])),
            max_packet_bytes=None if self.rng.random() < 0.7 else 1600,  # an update in several chunks
        )
        self.broker = MemoryBroker(scenario.seed, limits)
        self.broker.on_publish = self._hear
        self.witness = Witness(FLEET, COORDINATOR_KEY.public, loop.time)
        self.settings = self._coordinator_settings()
        self.coordinator = CoordinatorMachine(
            COORDINATOR,
            loop,
            np.random.default_rng(seeds[1]),
            directory=directory / "coordinator",
            broker=self.broker,
            witness=self.witness,
            settings=self.settings,
            disk=scenario.coordinator_disk or SimulatedDisk(),
        )
        self.devices = [self._device(number, seeds[number + 3]) for number in range(scenario.devices)]
        self.coordinator.enrol([device.name for device in self.devices])
        self.machines = {machine.name: machine for machine in (self.coordinator, *self.devices)}
        self.chaos = Chaos(self, np.random.default_rng(seeds[2]))
        self.hearers: list[Callable[[str, Message], None]] = []

    async def run(self) -> None:
        """All of it."""
        self.coordinator.start()
        for device in self.devices:
            device.start()
        story = self.loop.create_task(self._story(), name="rig.story")
        looking = self.loop.create_task(self._look(), name="rig.witness")
        done, left = await asyncio.wait([story, looking], return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in done:
            task.result()

    def copy_coordinator(self) -> CoordinatorMachine:
        """A second coordinator on a copy of the first one's directory; start it at once."""
        self.witness.fork()
        copy = self.coordinator.copied(f"{COORDINATOR}-copy", self.directory / "copy")
        self.machines[copy.name] = copy
        return copy

    def go_on_with(self, coordinator: CoordinatorMachine) -> None:
        """Of two coordinators this is left."""
        self.coordinator = coordinator
        self.witness.one_goes_on()

    async def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        await asyncio.sleep(seconds)

    async def _story(self) -> None:
        scenario = self.scenario
        await self.chaos.run(scenario.faulty_s)
        if scenario.script is not None:
            await scenario.script(self)
        await self.chaos.calm()
        calm_since = self.loop.time()
        await asyncio.sleep(scenario.calm_s)
        for machine in self.machines.values():
            await machine.stop()
        self._check_ends()
        self.witness.check_progress(calm_since)

    def finished(self, since: float) -> Audit:
        """The audit of a fleet that has stopped."""
        recovered = recover(self.coordinator.directory / "state", self.settings, PLAN, self.coordinator.disk)
        committed = None if self.witness.forked else list(self.witness.committed)
        try:
            found = audit(recovered, PLAN.initial, committed)
        finally:
            recovered.close()
        self.witness.check_receipts(found)
        self.witness.check_updates(found, since)
        return found

    def _check_ends(self) -> None:
        ends = [end for machine in self.machines.values() for end in machine.ended_by_itself]
        if ends or self.loop.failures:
            raise PromiseBroken(f"P6: a program failed: {[*ends, *self.loop.failures][:5]}")

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self.scenario.look_every_s)
            self._check_ends()
            running = self.coordinator.service
            if running is not None and self.coordinator.alive:
                self.witness.looks_at(running)

    def _hear(self, machine: str, message: Message) -> None:
        if machine.startswith(COORDINATOR):
            self.witness.hears(message.topic, message.payload)
        for hear in self.hearers:
            hear(machine, message)

    def _device(self, number: int, seed: np.random.SeedSequence) -> DeviceMachine:
        rng = np.random.default_rng(seed)
        name = f"pump-{number}"
        low, high = self.scenario.train_s
        training = LocalTraining(retrain_after_s=float(rng.choice([10.0, 3600.0])))
        return DeviceMachine(
            name,
            self.loop,
            rng,
            directory=self.directory / "devices" / name,
            broker=self.broker,
            witness=self.witness,
            train_s=float(rng.uniform(low, high)),
            settings={"receipt_timeout_s": 5.0, "training": training, **self.scenario.device},
        )

    def _coordinator_settings(self) -> CoordinatorSettings:
        rng = self.rng
        aggregator = FedBuff(goal=self.scenario.goal)
        drawn: dict[str, Any] = {
            "aggregator": FedAsync(mixing=0.5) if rng.random() < 0.25 else aggregator,
            "server_optimizer": Momentum() if rng.random() < 0.25 else SGD(),
            "flush_after_s": 10.0,
            "publish": Publish(
                min_interval_s=float(rng.choice([0.5, 2.0])),
                keep_versions=int(rng.choice([3, 10, 1000])),
                format=ModelFormat.GRID if rng.random() < 0.3 else ModelFormat.FLOAT32,
            ),
            "update": Update(
                codec=str(rng.choice(["float32", "q8", "lowrank"], p=[0.4, 0.4, 0.2])),
                missing_after_s=2.0,
                retry_after_s=float(rng.choice([2.0, 10.0])),
            ),
            "journal": Journal(
                snapshot_every_updates=int(rng.integers(5, 60)),
                keep_bytes=int(rng.choice([1 << 15, 1 << 30])),
                max_batch=int(rng.choice([1, 4, 256])),
            ),
        }
        return settings_for(**{**drawn, **self.scenario.coordinator})


@contextmanager
def _killed_at_steps(fleet: Fleet) -> Iterator[None]:
    """Processes end at the steps that the scenario says, as far as chaos is abroad."""

    def reached(step: Step) -> None:
        process = current_process()
        if process is None or process.end is not None:
            return
        machine = fleet.machines[process.name.rpartition(".")[0]]
        if fleet.chaos.strikes_at(step, machine):
            fleet.chaos.kill(machine)
            raise Killed(process.name)

    listen(reached)
    try:
        yield
    finally:
        listen(None)


@contextmanager
def _silent(*, silent: bool) -> Iterator[None]:
    """Thousands of lines about faults that are meant to be."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL if silent else before)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _seldom_writes_status(every_s: float) -> Iterator[None]:
    """The file is for people, and a day has 172,800 half seconds."""
    with mock.patch.multiple(status, _SHORTEST_S=every_s, _LONGEST_S=every_s):
        yield


def simulate(scenario: Scenario, directory: Path, *, silent: bool = True) -> Report:
    """Run one.

    Args:
        scenario: what happens.
        directory: for what is a real file even here: the roster, the lock, the status.
        silent: whether the programs log nothing.

    Raises:
        PromiseBroken: a promise was; the text has the command that repeats it.
    """
    began = time.perf_counter()
    try:
        with (
            _silent(silent=silent),
            VirtualLoop(scenario.seed) as loop,
            _seldom_writes_status(scenario.status_every_s),
        ):
            fleet = Fleet(scenario, directory, loop)
            with _killed_at_steps(fleet):
                loop.run_until_complete(fleet.run())
            found = fleet.finished(loop.time() - scenario.calm_s)
            virtual_s = loop.time()
    except Exception as error:
        error.add_note(f"repeat it: {scenario.repeated_by}")
        raise
    return Report(
        audit=found,
        virtual_s=virtual_s,
        real_s=time.perf_counter() - began,
        starts={machine.name: machine.starts for machine in fleet.machines.values()},
        faults=dict(fleet.chaos.counts),
        strikes=dict(fleet.chaos.strikes),
        messages=fleet.broker.counts.published,
        disk_failures=sum(len(machine.disk_failures) for machine in fleet.machines.values()),
        dropped=fleet.broker.counts.overflowed,
        digest=found.digest,
    )
