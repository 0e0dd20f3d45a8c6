"""The machines of a simulated fleet: the real agent and coordinator, on clocks and disks of the rig."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import shutil
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from fleet_witness import Witness
from little_training import EXAMPLES, PLAN, Pull
from memory_broker import MemoryBroker
from simulated_disk import SimulatedDisk
from virtual_time import End, Killed, PartyClock, Process, VirtualLoop

from coordinator.fencing import Fenced
from coordinator.journal import StorageFailed
from coordinator.recovery import recover
from coordinator.service import CoordinatorService
from coordinator.settings import CoordinatorSettings
from edge_agent.agent import Agent, Workbench
from edge_agent.data_sources import Npz
from edge_agent.plan_runtime import LocalResult, Trainer
from edge_agent.settings import AgentSettings
from edge_agent.troubles import DiskFailed
from fedtide.wire.disk import Disk
from fedtide.wire.ids import DeviceId, FleetId
from fedtide.wire.link import Broker, Traffic
from fedtide.wire.signatures import SigningKey

FLEET: Final = FleetId("pumps")
COORDINATOR: Final = "coordinator"
COORDINATOR_KEY: Final = SigningKey.from_seed(bytes(range(32)))
_MOST_STATES: Final = 8
_RESTART_S: Final = 2.0
_RECONNECT: Final = Broker(reconnect_min_s=0.5, reconnect_max_s=20.0)


def device_key(device: str) -> SigningKey:
    """Its key, the same in every run."""
    return SigningKey.from_seed(hashlib.sha256(device.encode()).digest())


@dataclass
class Machine:
    """A computer with one program, that a service manager starts again.

    Attributes:
        name: for people, and for the network.
        loop: everybody's.
        rng: draws what the program draws, and what a power cut leaves of the disk.
        disk: what it writes to.
        clock: what it takes for the time.
        process: the program, while it runs.
        ended_by_itself: what it ended with, where nobody had killed it.
        disk_failures: what it ended with where its disk was at fault; the service manager starts it again.
        gave_way: set once it ended because another coordinator has the fleet.
    """

    name: str
    loop: VirtualLoop
    rng: np.random.Generator
    disk: Disk = field(default_factory=SimulatedDisk, kw_only=True)
    clock: PartyClock = field(init=False)
    process: Process | None = field(default=None, init=False)
    starts: int = field(default=0, init=False)
    ended_by_itself: list[str] = field(default_factory=list, init=False)
    disk_failures: list[str] = field(default_factory=list, init=False)
    gave_way: Fenced | None = field(default=None, init=False)
    _task: asyncio.Task[Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.clock = PartyClock(
            self.loop,
            booted_s=float(self.rng.uniform(0.0, 1e6)),
            skew_s=float(self.rng.uniform(-5.0, 5.0)),
        )

    @property
    def alive(self) -> bool:
        """Whether its program runs."""
        return self.process is not None and self.process.end is None and not self._has_ended

    @property
    def _has_ended(self) -> bool:
        return self._task is not None and self._task.done()

    def start(self) -> None:
        """Start the program, unless it runs."""
        if self.alive or self.gave_way is not None:
            return
        self.starts += 1
        self.process = Process(self.loop, f"{self.name}.{self.starts}")
        self._task = self.process.start(self._watched(self.process))

    def cut_power(self) -> None:
        """Whether its program runs or not: what was not synced may be lost."""
        if self.alive:
            self.die(End.POWER_CUT)
        elif isinstance(self.disk, SimulatedDisk):
            self.disk = self._left_of(self.disk)

    def die(self, end: End) -> None:
        """The program ends without a word."""
        if not self.alive or self.process is None:
            return
        self.process.die(end)
        if isinstance(self.disk, SimulatedDisk):  # what the dead still write, they write to the old one
            self.disk = self.disk.killed() if end is End.KILLED else self._left_of(self.disk)

    def _left_of(self, disk: SimulatedDisk) -> SimulatedDisk:
        """What a power cut leaves: one of several states, drawn."""
        wanted = int(self.rng.integers(_MOST_STATES))
        *_, state = itertools.islice(disk.crash_states(self.rng, most=_MOST_STATES), wanted + 1)
        return state

    async def stop(self) -> None:
        """End the program politely."""
        if self.alive and self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watched(self, process: Process) -> None:
        try:
            await self.program(process)
        except (Killed, asyncio.CancelledError):
            raise
        except Fenced as fenced:
            self.gave_way = fenced
        except BaseException as error:
            if process.end is not None:
                raise  # it is dead, and only being closed
            if isinstance(_cause(error), StorageFailed | DiskFailed | OSError):
                self.disk_failures.append(_told(error))
                self.loop.in_rig_at(self.loop.time() + _RESTART_S, self._start_again, process)
                return
            self.ended_by_itself.append(f"{process.name} at {self.loop.time():.3f} s: {_told(error)}")

    def _start_again(self, ended: Process) -> None:
        if self.process is ended:
            self.start()

    def program(self, process: Process) -> Coroutine[Any, Any, None]:
        """What it runs."""
        raise NotImplementedError


@dataclass
class DeviceMachine(Machine):
    """A device.

    Args:
        directory: its state.
        broker: what it dials.
        witness: is told what it does.
        train_s: how long it trains.
        settings: changes of its settings.
    """

    directory: Path
    broker: MemoryBroker
    witness: Witness
    train_s: float
    settings: dict[str, Any] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    agent: Agent | None = field(default=None, init=False)

    async def program(self, _process: Process) -> None:
        """See ``Machine.program``."""
        record = self.witness.device(self.name)
        target = int(hashlib.sha256(self.name.encode()).digest()[0]) / 128.0 - 1.0
        trainer = cast("Trainer", Pull(target, record))

        async def compute(work: Callable[[], LocalResult]) -> LocalResult:
            await asyncio.sleep(self.train_s * float(self.rng.uniform(0.5, 1.5)))
            return work()

        bench = Workbench(
            dial=self.broker.dialler(self.name, self.traffic),
            examples=lambda _manifest: EXAMPLES,
            trainer=lambda _plan: trainer,
            compute=compute,
            rng=self.rng,
            disk=self.disk,
            clock=self.clock,
        )
        self.disk.make_directory(self.directory)
        self.agent = agent = Agent(self._agent_settings(), device_key(self.name), bench)
        record.watch(agent)
        await agent.run()

    def _agent_settings(self) -> AgentSettings:
        return AgentSettings(
            fleet=FLEET,
            device=DeviceId(self.name),
            coordinator_key=str(COORDINATOR_KEY.public),
            key=self.directory / "device.key",
            state=self.directory,
            data=Npz(path=self.directory / "examples.npz"),
            **{"broker": _RECONNECT, **self.settings},
        )


@dataclass
class CoordinatorMachine(Machine):
    """The coordinator's.

    Args:
        directory: the fleet's.
        broker: what it dials.
        witness: is told what it does.
        settings: from ``coordinator.toml``.
    """

    directory: Path
    broker: MemoryBroker
    witness: Witness
    settings: CoordinatorSettings
    service: CoordinatorService | None = field(default=None, init=False)

    async def program(self, process: Process) -> None:
        """See ``Machine.program``."""
        recovered = recover(self.directory / "state", self.settings, PLAN, self.disk)
        self.witness.opens(recovered)
        closed = contextlib.ExitStack()
        closed.callback(os.close, recovered.lock)
        process.at_end.append(lambda _end: closed.close())
        try:
            self.service = service = CoordinatorService(
                self.settings,
                plan=PLAN,
                key=COORDINATOR_KEY,
                directory=self.directory,
                recovered=recovered,
                dial=self.broker.dialler(self.name),
                evaluate=None,
                clock=self.clock,
                rng=self.rng,
            )
            await service.run()
        finally:
            if process.end is None:
                recovered.journal.close()
                closed.close()

    def copied(self, name: str, directory: Path) -> "CoordinatorMachine":
        """Another machine, with a copy of this one's directory as it is now."""
        shutil.copytree(self.directory, directory)
        disk = SimulatedDisk()
        assert isinstance(self.disk, SimulatedDisk)
        for path, content in self.disk.files().items():
            moved = directory / path.relative_to(self.directory)
            disk.make_directory(moved.parent)
            disk.write(moved, content)
            disk.sync_directory(moved.parent)
        rng = np.random.default_rng(self.rng.integers(1 << 62))
        return CoordinatorMachine(
            name,
            self.loop,
            rng,
            directory=directory,
            broker=self.broker,
            witness=self.witness,
            settings=self.settings,
            disk=disk,
        )

    def enrol(self, devices: list[str]) -> None:
        """Put their keys into the roster."""
        roster = self.directory / "roster"
        roster.mkdir(parents=True, exist_ok=True)
        for device in devices:
            (roster / f"{device}.pub").write_text(f"{device_key(device).public}\n")


def _cause(error: BaseException) -> BaseException:
    """An error, or the first of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _told(error: BaseException) -> str:
    """An error and where it came from; of a group, the first of each."""
    error = _cause(error)
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{error!r} in {' < '.join(f'{frame.name}:{frame.lineno}' for frame in reversed(frames))}"


def settings_for(**changes: Any) -> CoordinatorSettings:
    """The coordinator's settings."""
    return CoordinatorSettings(fleet=FLEET, plan=Path("model.plan"), **{"broker": _RECONNECT, **changes})
