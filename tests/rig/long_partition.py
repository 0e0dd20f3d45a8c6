"""A fleet that is cut off for hours and comes back at once, twice; the second time machines die too."""

import asyncio
from typing import Final

from broker_memory import Limits
from scenario import Scenario
from simulated_fleet import Fleet
from virtual_time import End

from coordinator.aggregation import FedBuff
from coordinator.settings import Journal, Publish, Update
from edge_agent.settings import Inference, LocalTraining
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.link import Broker
from fedtide.wire.model_blob import ModelFormat

_BACK_S: Final = 900.0
_TEN_YEARS_S: Final = 10 * 365 * 86_400.0


def long_partition(seed: int, devices: int, hours: float, every_s: float = 1800.0) -> Scenario:
    """A twelfth of calm, a third cut off, a sixth of calm, a quarter half cut off, the rest calm.

    Args:
        seed: of everything.
        devices: how many.
        hours: virtual.
        every_s: seconds that a device rests between two updates.
    """
    calm_s = _BACK_S + 1.5 * every_s  # receipts ask for half as long to one and a half times
    twelfth_s = (hours * 3600.0 - calm_s) / 12

    async def script(fleet: Fleet) -> None:
        await asyncio.sleep(twelfth_s)
        fleet.broker.partition({device.name for device in fleet.devices})
        await asyncio.sleep(4 * twelfth_s)
        fleet.broker.heal()
        await asyncio.sleep(2 * twelfth_s)
        half = fleet.devices[::2]
        fleet.broker.partition({device.name for device in half})
        await asyncio.sleep(twelfth_s)
        for device in half:
            device.die(End.POWER_CUT)
            device.clock.skew_s = _TEN_YEARS_S
        fleet.coordinator.die(End.KILLED)
        fleet.broker.kill()
        await asyncio.sleep(twelfth_s)
        fleet.broker.start()
        fleet.coordinator.start()
        for device in half:
            device.start()
        await asyncio.sleep(twelfth_s)
        fleet.broker.heal()
        await asyncio.sleep(2 * twelfth_s)

    return Scenario(
        seed=seed,
        devices=devices,
        faulty_s=0.0,
        calm_s=calm_s,
        faults=(),
        step_odds=0.0,
        train_s=(30.0, 120.0),
        coordinator={
            "aggregator": FedBuff(goal=max(1, devices // 20)),
            "publish": Publish(min_interval_s=300.0, keep_versions=10_000, format=ModelFormat.FLOAT32),
            "update": Update(codec="float32", retry_after_s=every_s),
            "journal": Journal(snapshot_every_updates=2000),
            "broker": Broker(reconnect_max_s=60.0),
        },
        device={
            "training": LocalTraining(),
            "inference": Inference(min_interval_s=6 * 3600.0),
            "broker": Broker(),
            "receipt_timeout_s": 10.0,
        },
        limits=Limits(max_queued_messages=50),
        status_every_s=3600.0,
        look_every_s=10.0,
        coordinator_disk=UNSYNCED_DISK,
        script=script,
        command=f"python tests/rig/simulate.py --seed {seed} --devices {devices} --hours {hours:g}",
    )
