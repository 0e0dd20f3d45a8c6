"""Devices whose labels are wrong spoil the model: it goes back to a good version, and learns on."""

import asyncio
from dataclasses import replace

import pytest
from whole_fleet import audited, coordinator_here, make_fleet, simulated, until

from edge_agent.dataset import Dataset

ROLLBACK = "[rollback]\nmetric_drop = 0.2\npatience = 2\n"


def with_labels_flipped(device):
    """Every 0 is called a 9, every 1 an 8 …"""
    data = device.dataset
    return replace(device, dataset=Dataset(data.inputs, 9 - data.targets))


@pytest.mark.long
def test_a_model_that_wrong_labels_spoilt_goes_back_and_learns_on(digits, broker, tmp_path):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=4, seconds_per_update=0.01, more=ROLLBACK)
    spoilt = replace(fleet, devices=[with_labels_flipped(device) for device in fleet.devices])

    async def scenario():
        async with coordinator_here(fleet) as (service, _):

            def status():
                return service.status("running")

            def accuracy():
                points = status().evaluations
                return points[-1].metric if points else 0.0

            async with simulated(fleet):
                await until(lambda: accuracy() > 0.5, 40, status)
            async with simulated(spoilt):
                await until(lambda: status().rollbacks, 40, status)
            seen = status()
            async with simulated(fleet):
                after = seen.last_rollback.version
                await until(lambda: status().evaluations[-1].version > after and accuracy() > 0.5, 40, status)
            return seen

    seen = asyncio.run(scenario())
    metrics = {point.version: point.metric for point in seen.evaluations}
    back = seen.last_rollback
    bad = [version for version in metrics if back.good < version < back.version]
    assert len(bad) == 2  # patience
    best = max(metric for version, metric in metrics.items() if version <= back.good)
    assert all(metrics[version] < best - 0.2 for version in bad)
    assert metrics[back.good] >= best - 0.2
    assert set(back.devices) == {device.settings.device for device in fleet.devices}
    audited(fleet)  # a replay of the whole journal gives every version again, to the bit
