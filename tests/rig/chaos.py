"""What fails in a simulated fleet, and when. Every fault ends by itself; :meth:`Chaos.calm` ends them all."""

import asyncio
import errno
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import numpy as np
from broker_memory import CALM, Message, Weather
from memory_broker import MemoryBroker
from simulated_disk import Fault, SimulatedDisk, at, full
from simulated_machines import COORDINATOR, FLEET, DeviceMachine, Machine
from virtual_time import End

from fedtide.wire import topics
from fedtide.wire.ids import DeviceId
from fedtide.wire.link import LinkDown, Session
from fedtide.wire.steps import Step

if TYPE_CHECKING:
    from simulated_fleet import Fleet

TEN_YEARS_S: Final = 10 * 365.25 * 86_400.0
_RECORDED: Final = 200
_MOST_TRIALS: Final = 3


class Chaos:
    """Breaks one fleet.

    Args:
        fleet: which.
        rng: draws everything.

    Attributes:
        counts: how often each fault came.
        strikes: how often a process ended at each step.
    """

    def __init__(self, fleet: "Fleet", rng: np.random.Generator) -> None:
        self.counts: Counter[str] = Counter()
        self.strikes: Counter[Step] = Counter()
        self._fleet = fleet
        self._rng = rng
        self._abroad = False
        self._tasks: list[asyncio.Task[None]] = []
        self._heard: deque[tuple[str, Message]] = deque(maxlen=_RECORDED)

    async def run(self, seconds: float) -> None:
        """Let things fail for so long."""
        self._fleet.hearers.append(self._remember)
        self._abroad = True
        loop, scenario = self._fleet.loop, self._fleet.scenario
        end = loop.time() + seconds
        while not self._has_struck_enough():
            wait_s = float(self._rng.exponential(scenario.every_s))
            if loop.time() + wait_s >= end:
                await asyncio.sleep(end - loop.time())
                return
            await asyncio.sleep(wait_s)
            if not scenario.faults:
                continue
            name = str(self._rng.choice(scenario.faults))
            self.counts[name] += 1
            self._begin(FAULTS[name](self), name)

    async def calm(self) -> None:
        """End every fault: whoever is away comes back, and the network is what it should be."""
        self._abroad = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        broker = self._fleet.broker
        broker.weather = CALM
        broker.thaw()
        broker.heal()
        broker.start(keep=bool(self._rng.integers(2)))
        for machine in self._fleet.machines.values():
            machine.start()

    def strikes_at(self, step: Step, machine: Machine) -> bool:
        """Whether the process that has come to this step ends here."""
        scenario = self._fleet.scenario
        if self._is_spared(machine):
            return False
        if not self._abroad or scenario.only_step not in {None, step}:
            return False
        if self.strikes[step] == scenario.most_strikes or self._rng.random() >= scenario.step_odds:
            return False
        self.strikes[step] += 1
        return True

    def _is_spared(self, machine: Machine) -> bool:
        """An agent that ended three times in its first update takes that for the plan's fault, for ever."""
        is_new = isinstance(machine, DeviceMachine) and not self._fleet.witness.device(machine.name).put
        return is_new and machine.starts >= _MOST_TRIALS

    def _has_struck_enough(self) -> bool:
        """Whether processes ended at every step that they are to end at, as often as they are to."""
        scenario = self._fleet.scenario
        steps = list(Step) if scenario.only_step is None else [scenario.only_step]
        return all(self.strikes[step] >= scenario.most_strikes for step in steps)

    def kill(self, machine: Machine) -> None:
        """End a machine's program, or cut its power; it starts again a while later."""
        if self._is_spared(machine):
            return
        end = End.KILLED if self._rng.random() < 0.5 else End.POWER_CUT
        self.counts[f"{'coordinator' if machine.name == COORDINATOR else 'device'} {end.name.lower()}"] += 1
        away_s = float(self._rng.uniform(0.1, 5.0))
        machine.die(end)
        self._fleet.loop.in_rig(lambda: self._begin(self._bring_back(machine, away_s), "bring back"))

    def _begin(self, fault: Awaitable[None], name: str) -> None:
        task = self._fleet.loop.create_task(fault, name=f"rig.{name}")
        self._tasks = [each for each in self._tasks if not each.done()]
        self._tasks.append(task)

    def _remember(self, machine: str, message: Message) -> None:
        if message.topic.startswith(f"fl/1/{FLEET}/up/"):
            self._heard.append((machine, message))

    async def _bring_back(self, machine: Machine, away_s: float) -> None:
        await asyncio.sleep(away_s)
        machine.start()

    def _some_device(self) -> DeviceMachine:
        return self._fleet.devices[int(self._rng.integers(len(self._fleet.devices)))]

    def _some_machine(self) -> Machine:
        machines = list(self._fleet.machines.values())
        return machines[int(self._rng.integers(len(machines)))]

    async def _for_a_while(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(float(self._rng.uniform(low_s, high_s)))

    # The faults.

    async def kill_device(self) -> None:
        self.kill(self._some_device())

    async def kill_coordinator(self) -> None:
        self.kill(self._fleet.coordinator)

    async def kill_broker(self) -> None:
        """It comes back empty, or as it was when it was last saved."""
        broker: MemoryBroker = self._fleet.broker
        if self._rng.random() < 0.5:
            broker.save()
            await self._for_a_while(0.0, 5.0)
        broker.kill()
        await self._for_a_while(0.1, 10.0)
        broker.start(keep=bool(self._rng.integers(2)))

    async def partition(self) -> None:
        """Some machines, the coordinator perhaps, do not reach the broker."""
        names = [name for name in self._fleet.machines if self._rng.random() < 0.5]
        self._fleet.broker.partition(names)
        await self._for_a_while(1.0, 200.0)
        self._fleet.broker.heal()

    async def cut(self) -> None:
        """One machine's connection breaks."""
        self._fleet.broker.cut(self._some_machine().name)

    async def freeze(self) -> None:
        """The broker stands still."""
        self._fleet.broker.freeze()
        await self._for_a_while(0.5, 100.0)
        self._fleet.broker.thaw()

    async def weather(self) -> None:
        """Messages are lost, repeated, reordered and corrupted."""
        rng = self._rng
        self._fleet.broker.weather = Weather(
            latency_s=(0.001, float(rng.choice([0.02, 0.5, 3.0]))),
            drop=float(rng.choice([0.0, 0.05, 0.3])),
            duplicate=float(rng.choice([0.0, 0.3])),
            reorder_s=float(rng.choice([0.0, 0.2, 5.0])),
            corrupt=float(rng.choice([0.0, 0.0, 0.05])),
        )
        await self._for_a_while(1.0, 30.0)
        self._fleet.broker.weather = CALM

    async def jump(self) -> None:
        """A clock is ten years off from here on."""
        machine = self._some_machine()
        machine.clock.skew_s = float(self._rng.choice([-TEN_YEARS_S, 0.0, TEN_YEARS_S]))

    async def fill_disk(self) -> None:
        """Nothing more goes onto a machine's disk for a while."""
        await self._with_disk_fault(full)

    async def fail_disk(self) -> None:
        """One of the next operations fails; the machine is started anew, as after a read-only remount."""
        machine = self._some_machine()
        disk = machine.disk
        if self._is_spared(machine) or not isinstance(disk, SimulatedDisk):
            return
        disk.fail(at(disk.operations + int(self._rng.integers(1, 60)), errno.EIO))
        try:
            await self._for_a_while(1.0, 20.0)
        finally:
            disk.fail(None)
            machine.cut_power()
        self._begin(self._bring_back(machine, 1.0), "bring back")

    async def _with_disk_fault(self, fault: Fault) -> None:
        disk = self._some_machine().disk
        if isinstance(disk, SimulatedDisk):
            disk.fail(fault)
            try:
                await self._for_a_while(1.0, 20.0)
            finally:
                disk.fail(None)

    async def replay(self) -> None:
        """Somebody sends again, in a device's place, what was sent before."""
        heard = list(self._heard)
        if heard:
            chosen = [heard[int(self._rng.integers(len(heard)))] for _ in range(20)]
            await self._send([(message.topic, message.payload) for _, message in chosen])

    async def poison(self) -> None:
        """Garbage, and updates of which one bit is flipped, in a device's place."""
        device = DeviceId(self._some_device().name)
        topic = topics.UPDATE.name(FLEET, shard=0, device=device)
        bad = [(topic, self._rng.bytes(int(self._rng.integers(0, 400)))) for _ in range(5)]
        for _, message in list(self._heard)[-5:]:
            place = int(self._rng.integers(len(message.payload)))
            payload = message.payload[:place] + b"\x5a" + message.payload[place + 1 :]
            bad.append((message.topic, payload))
        await self._send(bad)

    async def flood(self) -> None:
        """A device that sends its last update again and again."""
        if self._heard:
            _, message = self._heard[-1]
            await self._send([(message.topic, message.payload)] * 100)

    async def _send(self, messages: list[tuple[str, bytes]]) -> None:
        dial = self._fleet.broker.dialler("somebody else")
        name = f"stranger-{int(self._rng.integers(1 << 30))}"
        try:
            connection = await dial(Session(name, True, 0, 32, None), 0)
            for topic, payload in messages:
                await connection.publish(topic, payload)
            await connection.close()
        except LinkDown:
            return


FAULTS: Final[dict[str, Callable[[Chaos], Awaitable[None]]]] = {
    "kill-device": Chaos.kill_device,
    "kill-coordinator": Chaos.kill_coordinator,
    "kill-broker": Chaos.kill_broker,
    "partition": Chaos.partition,
    "cut": Chaos.cut,
    "freeze": Chaos.freeze,
    "weather": Chaos.weather,
    "jump": Chaos.jump,
    "fill-disk": Chaos.fill_disk,
    "fail-disk": Chaos.fail_disk,
    "replay": Chaos.replay,
    "poison": Chaos.poison,
    "flood": Chaos.flood,
}
"""Every fault by its name."""
