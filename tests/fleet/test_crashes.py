"""Everything is killed at any moment; every receipt that was ever given stays true (P1, P2, P3, P7).

The long run takes its size from the environment: FEDTIDE_UPDATES, FEDTIDE_KILLS and FEDTIDE_SEED.
"""

import os

import pytest
from device_ledger import assert_every_receipt_is_true, history
from kill_loop import COORDINATOR_STEPS, DEVICE_STEPS, KillLoop
from whole_fleet import assert_balanced, make_fleet

from broker_config.local import free_port, start_local_broker
from coordinator.plan.file import load
from coordinator.recovery import recover
from fedtide.wire.steps import Step

SNAPSHOTS = "[journal]\nsnapshot_every_updates = 40\n"
SOME_SNAPSHOTS = "[journal]\nsnapshot_every_updates = 200\n"
FORGETFUL = """
listener {port} 127.0.0.1
allow_anonymous true
user root
persistence false
max_inflight_messages 32
max_queued_messages 20000
set_tcp_nodelay true
"""


@pytest.fixture
def forgetful(tmp_path):
    """A broker that keeps nothing."""
    port = free_port()
    with start_local_broker(tmp_path / "broker", "mosquitto", FORGETFUL.format(port=port), port) as broker:
        yield broker


def killed_again_and_again(
    digits, broker, path, *, updates, kills, seed, devices=8, more=SNAPSHOTS, instead=()
):
    fleet = make_fleet(path, digits, broker.port, devices=devices, seconds_per_update=0.0, more=more)
    text = fleet.directory.settings_file.read_text()
    for usual, other in instead:
        assert text.count(usual) == 1
        text = text.replace(usual, other)
    fleet.directory.settings_file.write_text(text)
    loop = KillLoop(fleet, broker, seed)
    witness = loop.run(updates=updates, kills=kills, report=print)
    print(dict(loop.killed))
    seen = assert_every_receipt_is_true(fleet, witness)
    assert seen.updates.applied >= updates
    assert len(witness.applied()) > kills
    assert seen.epoch > 1


@pytest.mark.mosquitto
def test_twenty_kills_leave_every_receipt_true(digits, forgetful, tmp_path):
    killed_again_and_again(digits, forgetful, tmp_path, updates=400, kills=20, seed=1)


@pytest.mark.long
@pytest.mark.mosquitto
def test_hundreds_of_kills_leave_every_receipt_true(digits, forgetful, tmp_path):
    updates, kills, seed = (
        int(os.environ.get(f"FEDTIDE_{name}", usual))
        for name, usual in (("UPDATES", 20_000), ("KILLS", 300), ("SEED", 2))
    )
    killed_again_and_again(
        digits, forgetful, tmp_path, updates=updates, kills=kills, seed=seed, devices=16, more=SOME_SNAPSHOTS
    )


@pytest.mark.long
@pytest.mark.mosquitto
def test_kills_leave_every_receipt_true_where_each_update_makes_a_version(digits, forgetful, tmp_path):
    fedasync = ('kind = "fedbuff"\ngoal = 3', 'kind = "fedasync"\nmixing = 0.5')
    at_once = ("min_interval_s = 0.05", "min_interval_s = 0.0")
    killed_again_and_again(
        digits, forgetful, tmp_path, updates=1000, kills=40, seed=3, instead=(fedasync, at_once)
    )


@pytest.mark.mosquitto
def test_the_coordinator_may_die_at_any_step(digits, forgetful, tmp_path):
    dies_at_each(COORDINATOR_STEPS, digits, forgetful, tmp_path, times=1)


@pytest.mark.mosquitto
def test_devices_may_die_at_any_step(digits, forgetful, tmp_path):
    dies_at_each(DEVICE_STEPS, digits, forgetful, tmp_path, times=1)


@pytest.mark.long
@pytest.mark.mosquitto
@pytest.mark.parametrize("steps", [COORDINATOR_STEPS, DEVICE_STEPS], ids=["coordinator", "devices"])
def test_everybody_may_die_fifty_times_at_any_step(digits, forgetful, tmp_path, steps):
    dies_at_each(steps, digits, forgetful, tmp_path, times=50)


def dies_at_each(steps, digits, broker, path, *, times):
    fleet = make_fleet(path, digits, broker.port, devices=6, seconds_per_update=0.0, more=SNAPSHOTS)
    loop = KillLoop(fleet, broker, 0)
    witness = loop.kill_at_each_step(steps, times=times, report=print)
    assert loop.killed == dict.fromkeys(steps, times)
    assert_every_receipt_is_true(fleet, witness)


@pytest.mark.mosquitto
@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.long)])
def test_the_coordinator_may_die_while_it_forgets_old_segments(digits, forgetful, tmp_path, times):
    """Its journal no longer tells everything: what its marks and the devices' ledgers say must agree."""
    short = "[journal]\nsnapshot_every_updates = 20\nkeep_bytes = 1\n"
    fleet = make_fleet(tmp_path, digits, forgetful.port, devices=4, seconds_per_update=0.0, more=short)
    loop = KillLoop(fleet, forgetful, 0)
    loop.kill_at_each_step([Step.SEGMENT_REMOVED], times=times)
    recovered = recover(fleet.directory.state, fleet.settings(), load(fleet.settings().plan))
    try:
        applied = {device: mark.applied for device, mark in recovered.journal.marks().items()}
    finally:
        recovered.close()
    for device in fleet.devices:
        told = history(device.settings.state)
        resolved = len(told.with_verdict("applied", "duplicate"))
        assert resolved <= applied[device.settings.device] <= resolved + len(told.waiting)
    seen = fleet.status()
    assert_balanced(seen.updates)
    assert seen.updates.applied == sum(applied.values())
