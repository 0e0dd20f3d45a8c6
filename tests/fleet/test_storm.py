"""A whole fleet comes at one moment: light devices, a real broker, a real coordinator on a real disk."""

import asyncio

import pytest
from storm_run import device_names, signed_updates, storm, storm_fleet
from whole_fleet import assert_balanced

pytestmark = pytest.mark.mosquitto

_MB = 1_000_000


def come(tmp_path, devices, within_s, *, kill=False, more="", **waits):
    """Let so many devices come; what they saw, the last status, and the updates applied by device."""

    async def main():
        async with storm_fleet(tmp_path, devices, more=more) as fleet:

            async def killed():
                await fleet.kill()
                await fleet.start()

            updates = list(signed_updates(device_names(devices), await fleet.head()))
            seen = await storm(
                fleet, updates, within_s=within_s, in_its_middle=killed if kill else None, **waits
            )
            status = await fleet.settled(devices // 2 if kill else devices)
            await fleet.stop()
            return seen, status, fleet.applied()

    return asyncio.run(main())


def assert_all_applied_once(devices, seen, status, applied):
    names = list(device_names(devices))
    assert sorted(seen.record.receipts) == names
    assert applied == dict.fromkeys(names, 1)
    assert status.updates.applied == devices
    assert status.updates.rejected == {}
    assert_balanced(status.updates)


def test_of_a_fleet_that_comes_at_once_each_device_has_a_receipt_and_counts_once(tmp_path):
    devices = 250
    seen, status, applied = come(tmp_path, devices, 0.25, deadline_s=60)
    assert_all_applied_once(devices, seen, status, applied)
    assert seen.verdicts == {"applied": devices}
    assert seen.record.sent <= 1.2 * devices
    assert seen.record.lost_connections == 0


def test_a_coordinator_killed_in_the_middle_of_a_storm_loses_nothing_and_applies_nothing_twice(tmp_path):
    devices = 150
    seen, status, applied = come(tmp_path, devices, 0.25, kill=True, deadline_s=90, receipt_timeout_s=2.0)
    assert_all_applied_once(devices, seen, status, applied)
    assert seen.verdicts["applied"] + seen.verdicts["duplicate"] == devices
    assert status.epoch == 2


@pytest.mark.long
def test_two_thousand_devices_within_a_second(tmp_path):
    devices = 2_000
    seen, status, applied = come(tmp_path, devices, 1.0, deadline_s=300)
    assert_all_applied_once(devices, seen, status, applied)
    assert seen.record.sent <= 1.2 * devices
    assert status.rss_bytes <= 256 * _MB


@pytest.mark.long
def test_two_thousand_devices_that_nobody_spreads_have_their_receipts_too(tmp_path):
    """More is on its way than the coordinator reads; that it waits for the broker meanwhile would show."""
    devices = 2_000
    at_once = "pacing = { at_once = 1_000_000 }"
    seen, status, applied = come(tmp_path, devices, 0.0, more=at_once, deadline_s=300)
    assert_all_applied_once(devices, seen, status, applied)
    assert status.rss_bytes <= 256 * _MB
