"""From training to a prediction: a version passes the gate, and devices run it without a network."""

import asyncio
import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from test_agent_process import device_environment, run
from whole_fleet import coordinator_here, make_fleet, simulated, until

from coordinator.plan.file import load
from coordinator.recovery import recover
from edge_agent import reports
from edge_agent.inference import LocalModel
from edge_agent.plan_runtime import Evaluator
from edge_agent.settings import Inference, LocalTraining

AGENT = """
fleet = "{settings.fleet}"
device = "{settings.device}"
coordinator_key = "{settings.coordinator_key}"
key = "unused"
state = "{settings.state}"
[data]
kind = "npz"
path = "unused.npz"
"""


@pytest.fixture(autouse=True)
def reports_come_often(monkeypatch):
    """Devices say what they found every five seconds; a test has no time for that."""
    monkeypatch.setattr(reports, "_EVERY_S", 0.1)


def parameters_of(fleet, version):
    """The parameters of a version as devices hold it, from the coordinator's files."""
    recovered = recover(fleet.directory.state, fleet.settings(), load(fleet.settings().plan))
    try:
        return recovered.models.parameters(version)
    finally:
        recovered.close()


def make(tmp_path, digits, port, more):
    """Two devices that hold out a fifth of their examples."""
    fleet = make_fleet(tmp_path, digits, port, devices=2, goal=2, more=more)
    fleet.devices = [
        replace(
            device,
            settings=msgspec.structs.replace(
                device.settings,
                training=LocalTraining(evaluation_share=0.2),
                inference=Inference(min_interval_s=0.2),
            ),
        )
        for device in fleet.devices
    ]
    return fleet


async def predict(fleet, tmp_path, *more):
    """``fedtide agent predict`` for the first device, in its own process, on the held-out examples."""
    config = tmp_path / "agent.toml"
    config.write_text(AGENT.format(settings=fleet.devices[0].settings))
    held_out = fleet.directory.path / "held-out.npz"
    arguments = ("-m", "fedtide", "agent", "predict", "--config", str(config), "--input", str(held_out))
    return await run(device_environment(tmp_path / f"shim-{len(more)}"), *arguments, *more)


def test_a_device_predicts_with_the_version_that_passed_the_gate(digits, broker, tmp_path):
    fleet = make(tmp_path, digits, broker.port, "[release]\nmetric_at_least = 0.8\n")

    async def scenario():
        async with coordinator_here(fleet) as (service, _running), simulated(fleet):
            await until(lambda: service.status("").released_version, 40, lambda: service.status(""))
            released = tmp_path / "devices" / "0" / "models" / "released.model"
            await until(released.exists, 20, lambda: service.status(""))
            await until(
                lambda: service.status("").federated and service.status("").federated.metric > 0.5,
                20,
                lambda: service.status(""),
            )
            while_running = await predict(fleet, tmp_path, "--json")
        return while_running, service.status("offline"), await predict(fleet, tmp_path)

    (code, output), seen, (later, _) = asyncio.run(scenario())
    assert (code, later) == (0, 0), output
    *_, line = output.splitlines()
    found = json.loads(line)
    assert found["gate"] == "accuracy at least 0.8 on the coordinator's held-out examples"

    point = next(point for point in seen.evaluations if point.version == found["version"])
    assert point.metric >= 0.8
    right = np.array(found["classes"]) == digits.held_out.targets
    assert right.mean() == pytest.approx(point.metric, abs=1e-6)

    expected = Evaluator(load(digits.plan).plan).predict(
        parameters_of(fleet, found["version"]), digits.held_out.inputs
    )
    assert np.array(found["outputs"]) == pytest.approx(expected, abs=1e-5)

    assert seen.federated.devices == 2
    assert seen.federated.metric <= 1.0
    assert 0.1 * len(digits.train) < seen.federated.examples < 0.3 * len(digits.train)
    assert all(device.evaluation is not None for device in seen.devices)

    async def restart():
        async with coordinator_here(fleet) as (service, _running):
            await until(lambda: service.status("").published_version is not None, 20, lambda: None)
            return service.status("").released_version

    assert asyncio.run(restart()) >= seen.released_version


def test_the_devices_own_examples_can_decide(digits, broker, tmp_path):
    gate = '[release]\non = "federated"\nmetric_at_least = 0.7\nmin_devices = 2\n'
    fleet = make(tmp_path, digits, broker.port, gate)

    async def scenario():
        async with coordinator_here(fleet) as (service, _running), simulated(fleet):
            await until(lambda: service.status("").released_version, 60, lambda: service.status(""))
            released = tmp_path / "devices" / "1" / "models" / "released.model"
            await until(released.exists, 20, lambda: service.status(""))
        return service.status("offline")

    seen = asyncio.run(scenario())
    by_version = {mean.version: mean for mean in seen.federated_history}
    assert by_version[seen.released_version].metric >= 0.7
    assert by_version[seen.released_version].devices == 2
    settings = fleet.devices[1].settings
    model = LocalModel.open(settings.state, settings.coordinator_key)
    assert model.gate == "accuracy at least 0.7 on the examples that at least 2 devices hold out"
