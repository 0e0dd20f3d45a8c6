"""The coordinator is killed at random moments; every receipt it ever gave stays true (P1, P3, P7)."""

import asyncio
import signal

import numpy as np
import pytest
from whole_fleet import (
    Witness,
    applied_in_journal,
    assert_balanced,
    audited,
    make_fleet,
    simulated,
    start_coordinator,
    until,
)

SNAPSHOTS = "[journal]\nsnapshot_every_updates = 40\n"


def log_of(fleet):
    return (fleet.directory.path / "coordinator.log").read_text()[-4000:]


async def kill_at_a_random_moment(fleet, rng):
    """Kill -9 while it starts, while it receives, or in the middle of a version; the moments are drawn."""
    process = await start_coordinator(fleet)
    if rng.random() < 0.2:
        wait_s = rng.uniform(0.3, 1.5)  # imports, recovery, the first connection
    else:
        before = applied_in_journal(fleet)
        await until(lambda: applied_in_journal(fleet) > before, 30, lambda: log_of(fleet))
        wait_s = rng.uniform(0.0, 0.4)
    await asyncio.wait([asyncio.create_task(process.wait())], timeout=wait_s)
    assert process.returncode is None, f"it ended by itself: {log_of(fleet)}"
    process.kill()
    assert await process.wait() == -signal.SIGKILL


async def stop_after_more_updates(fleet, more):
    """A last run that ends well."""
    process = await start_coordinator(fleet)
    before = applied_in_journal(fleet)
    await until(lambda: applied_in_journal(fleet) >= before + more, 30, lambda: log_of(fleet))
    process.terminate()
    assert await process.wait() == 0, log_of(fleet)


def kill_again_and_again(fleet, kills, seed):
    async def scenario():
        rng, witness = np.random.default_rng(seed), Witness(fleet)
        async with witness.listening(), simulated(fleet) as devices:
            for number in range(kills):
                await kill_at_a_random_moment(fleet, rng)
                print(f"kill {number + 1}: {applied_in_journal(fleet)} updates in the journal")
            await stop_after_more_updates(fleet, 20)
        return witness, devices

    return asyncio.run(scenario())


def assert_every_receipt_is_true(fleet, witness, devices, kills):
    # Each update once, replay equal to every published version, marks and totals in agreement:
    record = audited(fleet)
    journaled = set(record.updates)
    assert witness.unsigned == 0
    assert witness.applied() <= journaled
    assert len(witness.applied()) > kills
    counted = sum(tally.applied for tallies in devices.tallies.values() for tally in tallies)
    resolved = counted + sum(tally.duplicate for tallies in devices.tallies.values() for tally in tallies)
    assert resolved <= len(journaled) <= resolved + len(fleet.devices)

    seen = fleet.status()
    assert seen.state == "offline"
    assert 1 < seen.epoch <= kills + 1  # a kill during the start may come before the epoch is claimed
    assert_balanced(seen.updates)
    # What arrives while the coordinator leaves waits, unacknowledged, and will be sent again.
    assert seen.updates.applied == len(journaled)
    assert seen.updates.waiting <= len(fleet.devices)
    assert seen.version == record.version


def test_eight_kills_leave_every_receipt_true(digits, broker, tmp_path):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=6, more=SNAPSHOTS)
    witness, devices = kill_again_and_again(fleet, 8, seed=1)
    assert_every_receipt_is_true(fleet, witness, devices, 8)


@pytest.mark.long
def test_sixty_kills_leave_every_receipt_true(digits, brokers, tmp_path):
    fleet = make_fleet(tmp_path, digits, brokers.port, devices=12, more=SNAPSHOTS)
    witness, devices = kill_again_and_again(fleet, 60, seed=2)
    assert_every_receipt_is_true(fleet, witness, devices, 60)


@pytest.mark.long
def test_kills_leave_every_receipt_true_where_each_update_makes_a_version(digits, broker, tmp_path):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=12, more=SNAPSHOTS)
    text = fleet.directory.settings_file.read_text()
    fedasync = text.replace('kind = "fedbuff"\ngoal = 3', 'kind = "fedasync"\nmixing = 0.5')
    fleet.directory.settings_file.write_text(
        fedasync.replace("min_interval_s = 0.05", "min_interval_s = 0.0")
    )
    witness, devices = kill_again_and_again(fleet, 20, seed=3)
    assert_every_receipt_is_true(fleet, witness, devices, 20)
