"""The demo's fleet: its directory, and simulated devices of three kinds."""

from pathlib import Path

import numpy as np

from coordinator.plan.file import BuiltPlan, save
from edge_agent.data_sources import Npz
from edge_agent.settings import AgentSettings
from edge_agent.simulation import Outage, SimulatedDevice
from fedtide.demo.digits import Digits
from fedtide.demo.settings import DemoSettings, kind_of
from fedtide.fleet_directory import FleetDirectory, NewFleet, create
from fedtide.wire.ids import DeviceId, FleetId
from fedtide.wire.link import Broker
from fedtide.wire.signatures import SigningKey

FLEET = FleetId("digits")
SECONDS_PER_UPDATE = 0.5
"""Of a fast device; training itself takes a few milliseconds."""
SLOW_FACTOR = 10.0
_OUTAGE_AFTER_S = 4.0
_OUTAGE_FOR_S = 5.0


def prepare(
    path: Path, plan: BuiltPlan, digits: Digits, settings: DemoSettings, broker: str
) -> FleetDirectory:
    """Make the fleet's directory: settings, plan, held-out examples."""
    directory, _ = create(path, NewFleet(fleet=FLEET, broker=broker))
    save(plan, directory.path / "model.plan")
    held_out = digits.held_out
    np.savez(directory.path / "held-out.npz", x=held_out.inputs[0], y=np.asarray(held_out.targets))
    goal = max(1, min(8, settings.devices // 2))
    directory.settings_file.write_text(
        _COORDINATOR.format(fleet=FLEET, broker=broker, goal=goal, codec=settings.codec)
    )
    return directory


def simulated_devices(
    directory: FleetDirectory, digits: Digits, settings: DemoSettings, broker: str, scratch: Path
) -> list[SimulatedDevice]:
    """Enrol and describe every device."""
    rng = np.random.default_rng([settings.seed, 1])
    coordinator_key = str(directory.key().public)
    devices = []
    for number, dataset in enumerate(digits.devices):
        kind = kind_of(number, settings)
        name = DeviceId(f"{kind}-{number:03d}")
        key = SigningKey.from_seed(rng.bytes(32))
        (directory.roster / f"{name}.pub").write_text(f"{key.public}\n")
        agent = AgentSettings(
            fleet=FLEET,
            device=name,
            coordinator_key=coordinator_key,
            key=scratch / name / "device.key",
            state=scratch / name,
            data=Npz(path=scratch / name / "examples.npz"),
            broker=Broker(hosts=(broker,), reconnect_min_s=0.5, reconnect_max_s=5.0),
        )
        factor = SLOW_FACTOR if kind == "slow" else 1.0
        pace_s = SECONDS_PER_UPDATE * factor * float(rng.uniform(0.8, 1.2))
        after_s = _OUTAGE_AFTER_S + float(rng.uniform(0.0, 1.0))
        outage = Outage(after_s, _OUTAGE_FOR_S) if kind == "dropping" else None
        devices.append(SimulatedDevice(agent, key, dataset, pace_s, outage))
    return devices


_COORDINATOR = """\
fleet = "{fleet}"
plan = "model.plan"
flush_after_s = 2.0

[broker]
hosts = ["{broker}"]
reconnect_min_s = 0.5
reconnect_max_s = 5.0

[aggregator]
kind = "fedbuff"
goal = {goal}

[staleness]
kind = "polynomial"
exponent = 0.5
max_staleness = 50

[publish]
min_interval_s = 0.2

[update]
codec = "{codec}"
weight_by_examples = true

[evaluation]
data = "held-out.npz"
"""
