"""Simulated devices: the agent's own code over real MQTT connections, many in one process and one event loop.

Only the surroundings are imitated: a device's speed (it waits as long as a slower machine would train), its
power cuts (the connection is cut without a goodbye, and the agent starts again from its files), and its disk
(files without syncs).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from edge_agent.agent import Agent, Workbench
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import LocalResult, Trainer
from edge_agent.sender import Tally
from edge_agent.settings import AgentSettings
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.ids import PlanId
from fedtide.wire.link import Traffic
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.plan import Plan
from fedtide.wire.signatures import SigningKey

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outage:
    """A device that vanishes without a goodbye and comes back.

    Attributes:
        after_s: seconds from the fleet's start to the cut.
        for_s: seconds it stays away.
    """

    after_s: float
    for_s: float


@dataclass(frozen=True)
class SimulatedDevice:
    """What is imitated of one device.

    Attributes:
        settings: as its ``agent.toml`` would say; the data source is not used.
        key: its private key.
        dataset: its examples.
        seconds_per_update: how long its local training takes, at least.
        outage: when it is away, if ever.
    """

    settings: AgentSettings
    key: SigningKey
    dataset: Dataset
    seconds_per_update: float = 0.0
    outage: Outage | None = None


@dataclass
class TrainerPool:
    """One trainer a plan for all devices of the process: they train one after the other."""

    _trainers: dict[PlanId, Trainer] = field(default_factory=dict)

    def trainer(self, plan: Plan) -> Trainer:
        """The plan's trainer, made when it is first asked for."""
        if plan.id not in self._trainers:
            self._trainers[plan.id] = Trainer(plan)
        return self._trainers[plan.id]


class SimulatedFleet:
    """Runs simulated devices until cancelled.

    Attributes:
        traffic: bytes and messages by device.
        tallies: what each device has done since it last started.
        away: devices that are in their outage now.
    """

    def __init__(self, devices: list[SimulatedDevice], seed: int) -> None:
        self._devices = devices
        self._seeds = np.random.SeedSequence(seed).spawn(len(devices))
        self._pool = TrainerPool()
        self.traffic = {device.settings.device: Traffic() for device in devices}
        self.tallies: dict[str, list[Tally]] = {device.settings.device: [] for device in devices}
        self.away: set[str] = set()

    async def run(self) -> None:
        """Start every device and keep it running."""
        async with asyncio.TaskGroup() as group:
            for device, seed in zip(self._devices, self._seeds, strict=True):
                group.create_task(self._live(device, seed), name=f"simulated.{device.settings.device}")

    async def _live(self, device: SimulatedDevice, seed: np.random.SeedSequence) -> None:
        rng = np.random.default_rng(seed)
        await asyncio.sleep(float(rng.uniform(0.0, 0.2)))  # a fleet does not switch on at one instant
        if device.outage is None:
            await self._agent(device, rng).run()
            return
        agent = self._agent(device, rng)
        running = asyncio.create_task(agent.run(), name=f"simulated.{device.settings.device}.agent")
        try:
            await asyncio.wait([running], timeout=device.outage.after_s)
            agent.cut()  # first, so that the ending agent cannot say goodbye
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        self.away.add(device.settings.device)
        await asyncio.sleep(device.outage.for_s)
        self.away.discard(device.settings.device)
        await self._agent(device, rng).run()

    def _agent(self, device: SimulatedDevice, rng: np.random.Generator) -> Agent:
        name = device.settings.device
        bench = Workbench(
            dial=MqttDialler(device.settings.broker, self.traffic[name]),
            examples=lambda _manifest: device.dataset,
            trainer=self._pool.trainer,
            compute=_paced(device.seconds_per_update),
            rng=rng,
            disk=UNSYNCED_DISK,
        )
        agent = Agent(device.settings, device.key, bench)
        self.tallies[name].append(agent.tally)
        return agent


def _paced(seconds_per_update: float) -> Callable[[Callable[[], LocalResult]], Awaitable[LocalResult]]:
    async def compute(work: Callable[[], LocalResult]) -> LocalResult:
        began = time.monotonic()
        result = work()
        await asyncio.sleep(seconds_per_update - (time.monotonic() - began))
        return result

    return compute
