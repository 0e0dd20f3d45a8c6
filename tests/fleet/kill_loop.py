"""Kill -9, again and again: the coordinator, a broker without persistence, both, or devices, as a seed says.

Coordinator and devices are real processes. Who is killed next, and at which step or after how long, is drawn;
what the fleet does in between goes at its own pace.
"""

import asyncio
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from device_ledger import LedgerFleet
from process_killer import KillAt, Started, start, start_coordinator
from whole_fleet import Witness, until

from fedtide.wire.signatures import SigningKey
from fedtide.wire.steps import Step

PATIENCE_S = 120.0
STARTING_S = 0.25
"""About as long as a start takes; some are killed within."""

COORDINATOR_STEPS = tuple(
    step for step in Step if step.startswith("coordinator.") and step is not Step.SEGMENT_REMOVED
)
"""Where a journal is small enough to keep everything."""
DEVICE_STEPS = tuple(step for step in Step if step.startswith("device."))
RARE_STEPS = frozenset(
    {Step.SNAPSHOT_WRITTEN, Step.SNAPSHOT_RECORDED, Step.SEGMENT_REMOVED, Step.COUNTER_RESERVED}
)
"""Reached once in many updates: a process ends at their first occurrence."""


class Victim(StrEnum):
    """Who is killed."""

    COORDINATOR = "coordinator"
    COORDINATOR_AT_A_STEP = "coordinator at a step"
    BROKER = "broker"
    BOTH = "broker and coordinator"
    DEVICES = "devices"


LIKELY = {
    Victim.COORDINATOR: 0.35,
    Victim.COORDINATOR_AT_A_STEP: 0.25,
    Victim.BROKER: 0.15,
    Victim.BOTH: 0.1,
    Victim.DEVICES: 0.15,
}


@dataclass(frozen=True)
class FarmedDevice:
    """A simulated device as another process is told of it."""

    device: object
    key: bytes


def run_devices(farmed, seed):
    """In a process of its own: simulated devices with ledgers, until it is killed."""
    devices = [replace(each.device, key=SigningKey.from_seed(each.key)) for each in farmed]
    asyncio.run(LedgerFleet(devices, seed).run())


@dataclass
class KillLoop:
    """A fleet whose parts are killed.

    Attributes:
        fleet: whose devices run in their own processes, half of them in each.
        broker: a local broker that keeps nothing.
        seed: of every choice.
        killed: how often who was.
    """

    fleet: object
    broker: object
    seed: int
    killed: Counter = field(default_factory=Counter)
    _farms: list[Started] = field(default_factory=list)
    _coordinator: Started | None = None

    def run(self, *, updates, kills, report=lambda _: None):
        """So many kills, spread over so many updates, and a good end; the witness of all receipts."""

        async def scenario():
            rng = np.random.default_rng(self.seed)
            async with Witness(self.fleet).listening() as witness:
                try:
                    self.start_devices()
                    self.start_coordinator()
                    for number in range(kills):
                        await self.applied(updates // (kills + 1))
                        victim = await self._kill(rng)
                        report(f"kill {number + 1} of {kills}, {victim}: {self.seen()} updates applied")
                    await self.applied(max(20, updates - self.seen()))
                    await self.end()
                finally:
                    await self.kill_everything()
            return witness

        return asyncio.run(scenario())

    def kill_at_each_step(self, steps, *, times, report=lambda _: None):
        """The coordinator, or the devices, end at each of these steps in turn; then a good end."""

        async def scenario():
            rng = np.random.default_rng(self.seed)
            async with Witness(self.fleet).listening() as witness:
                try:
                    self.start_devices()
                    for step in [step for step in steps for _ in range(times)]:
                        began = time.monotonic()
                        await self._at_step(step, rng)
                        report(f"{step}: {time.monotonic() - began:.1f} s, {self.seen()} updates applied")
                    if self._coordinator is None:
                        self.start_coordinator()
                    await self.applied(20)
                    await self.end()
                finally:
                    await self.kill_everything()
            return witness

        return asyncio.run(scenario())

    async def _at_step(self, step, rng):
        at = KillAt(step, 1 if step in RARE_STEPS else int(rng.integers(1, 6)))
        self.killed[step] += 1
        if step in DEVICE_STEPS:
            if self._coordinator is None:
                self.start_coordinator()
            await self._farms[0].killed()
            self._farms[0] = self._devices(0, at)
            await died(self._farms[0], step)
            self._farms[0] = self._devices(0)
        else:
            await died(start_coordinator(self.fleet.directory.path, at), step)

    # The parts.

    def start_devices(self):
        self._farms = [self._devices(half) for half in range(2)]

    def _devices(self, half, kill_at=None):
        devices = self.fleet.devices[half::2]
        farmed = [
            FarmedDevice(replace(each, key=None), each.key._key.private_bytes_raw()) for each in devices
        ]
        log = self.fleet.directory.path / f"devices-{half}.log"
        return start(run_devices, (farmed, self.seed + half), log, kill_at)

    def start_coordinator(self, kill_at=None):
        self._coordinator = start_coordinator(self.fleet.directory.path, kill_at)

    def seen(self):
        """Updates that the coordinator said it had applied, half a second ago or less."""
        file = self.fleet.directory.status_file
        return self.fleet.status().updates.applied if file.exists() else 0

    async def applied(self, more):
        """Wait for more updates, while everybody lives."""
        before = self.seen()
        await until(
            lambda: self.seen() >= before + more or not self._everybody_lives(),
            PATIENCE_S + more,
            lambda: f"{self.seen() - before} of {more} updates; {self._logs()}",
        )
        assert self._everybody_lives(), self._logs()

    async def end(self):
        """The coordinator ends well; the devices are killed."""
        self._coordinator.terminate()
        assert await self._coordinator.ended() == 0, self._coordinator.log_tail()
        self._coordinator = None

    async def kill_everything(self):
        parts = [*self._farms, *([self._coordinator] if self._coordinator else [])]
        await asyncio.gather(*(part.killed() for part in parts))

    def _everybody_lives(self):
        return all(farm.alive for farm in self._farms) and self._coordinator.alive

    def _logs(self):
        return "\n".join(part.log_tail() for part in (self._coordinator, *self._farms))

    # The kills.

    async def _kill(self, rng):
        victim = Victim(rng.choice(list(LIKELY), p=list(LIKELY.values())))
        self.killed[victim] += 1
        await asyncio.sleep(float(rng.uniform(0.0, 0.5)))  # somewhere in the middle of things
        match victim:
            case Victim.COORDINATOR:
                await self._coordinator.killed()
                if rng.random() < 0.3:  # and once more while it starts
                    self.start_coordinator()
                    await asyncio.sleep(float(rng.uniform(0.0, STARTING_S)))
                    await self._coordinator.killed()
                self.start_coordinator()
            case Victim.COORDINATOR_AT_A_STEP:
                await self._coordinator.killed()
                step = Step(rng.choice(COORDINATOR_STEPS))
                await self._at_step(step, rng)
                self.start_coordinator()
            case Victim.BROKER:
                await asyncio.to_thread(self.broker.kill)
                await asyncio.sleep(float(rng.uniform(0.0, 0.3)))
                await asyncio.to_thread(self.broker.start)
            case Victim.BOTH:
                await asyncio.gather(asyncio.to_thread(self.broker.kill), self._coordinator.killed())
                self.start_coordinator()
                await asyncio.to_thread(self.broker.start)
            case Victim.DEVICES:
                half = int(rng.integers(2))
                await self._farms[half].killed()
                self._farms[half] = self._devices(half)
        return victim


async def died(process, step):
    """Wait until a process has killed itself at its step."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            code = await process.ended()
    except TimeoutError:
        await process.killed()
        raise AssertionError(f"never came to {step}: {process.log_tail()}") from None
    assert code == -signal.SIGKILL, f"ended by itself with {code}, not at {step}: {process.log_tail()}"
