"""Whole fleets in virtual time, and what fails; each test is one row of the failure matrix, or all of it.

After each run the rig checks every promise: see ``fleet_witness``. What is asserted here is that what had to
fail did.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broker_memory import Limits, Weather
from chaos import Chaos
from fleet_witness import PromiseBroken
from long_partition import long_partition
from scenario import Report, Scenario
from simulated_disk import SimulatedDisk
from simulated_fleet import Fleet, simulate
from virtual_time import End

from coordinator import writer
from coordinator.aggregation import FedAsync
from coordinator.marks import Standing
from coordinator.settings import Journal, Publish, Update
from edge_agent.outbox import Outbox
from edge_agent.submission import Submission
from fedtide.wire.link import Broker
from fedtide.wire.model_blob import ModelFormat
from fedtide.wire.steps import Step

RIG = Path(__file__).parents[1] / "rig"
ROOT = RIG.parents[1]
SMALL: dict[str, Any] = {
    "publish": Publish(min_interval_s=1.0, keep_versions=100_000, format=ModelFormat.FLOAT32),
    "update": Update(codec="float32", missing_after_s=2.0, retry_after_s=4.0),
    "journal": Journal(snapshot_every_updates=8),
}
"""A coordinator that costs little."""


def small(seed: int, **changes: Any) -> Scenario:
    """A scenario that takes a few tenths of a second: waits are shorter than by default."""
    changes["coordinator"] = {**SMALL, **changes.get("coordinator", {})}
    return Scenario(
        **{
            "seed": seed,
            "devices": 2,
            "faulty_s": 15.0,
            "calm_s": 90.0,
            "step_odds": 0.0,
            "limits": Limits(keepalive_s=20.0),
            "device": {"broker": Broker(reconnect_min_s=0.5, reconnect_max_s=10.0)},
            **changes,
        }
    )


@pytest.mark.parametrize("seed", range(8))
def test_whatever_fails_every_promise_is_kept(seed: int, tmp_path: Path) -> None:
    simulate(small(seed, every_s=2.0, step_odds=0.01), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10_000, 10_300))
def test_whatever_fails_every_promise_is_kept_in_hundreds_of_fleets(seed: int, tmp_path: Path) -> None:
    simulate(Scenario(seed, devices=3 + seed % 5, every_s=1.0 + seed % 4, step_odds=0.01), tmp_path)


# One seed, one run.


LITTLE: dict[str, Any] = {"devices": 2, "faulty_s": 10.0, "calm_s": 100.0, "every_s": 1.0}


def told_elsewhere(seed: int, hash_seed: int) -> str:
    """The journal's digest after the same simulation in another process, where strings have other hashes."""
    arguments = f"--seed {seed} --devices 2 --seconds 10 --calm 100 --every 1"
    done = subprocess.run(
        [sys.executable, str(RIG / "simulate.py"), *arguments.split()],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"},
    )
    return done.stdout.strip()[-16:]


def test_one_seed_gives_one_journal_in_every_process(tmp_path: Path) -> None:
    here = simulate(Scenario(5, **LITTLE), tmp_path / "first").digest
    assert told_elsewhere(5, hash_seed=1) == here[:16]
    assert simulate(Scenario(6, **LITTLE), tmp_path / "other").digest != here


# The matrix.


def test_f1_devices_killed_in_training(tmp_path: Path) -> None:
    report = simulate(
        small(1, devices=4, faults=("kill-device",), every_s=1.0, only_step=Step.TRAINED, step_odds=0.2),
        tmp_path,
    )
    assert report.faults["kill-device"] > 5
    assert report.strikes[Step.TRAINED] > 0


EVERY_STEP: dict[str, Any] = {
    "publish": Publish(min_interval_s=1.0, keep_versions=20, format=ModelFormat.FLOAT32),
    "update": Update(
        codec="lowrank", codec_parameters={"step": 0.05}, missing_after_s=2.0, retry_after_s=2.0
    ),
    "journal": Journal(snapshot_every_updates=5, keep_bytes=1 << 14),
}
"""A coordinator that comes to every step soon: updates with feedback, many snapshots, a short journal."""


def at_steps(directory: Path, *, only: Step | None, strikes: int, **changes: Any) -> Report:
    """A fleet whose processes end at one step, or at every one, so many times."""
    return simulate(
        small(
            7,
            faulty_s=200.0 * strikes,
            faults=(),
            every_s=1.0,
            only_step=only,
            step_odds=0.5,
            most_strikes=strikes,
            coordinator=EVERY_STEP,
            limits=Limits(max_packet_bytes=1600, keepalive_s=20.0),  # an update in several chunks
            **changes,
        ),
        directory,
    )


def test_f1_f2_f7_to_f9_devices_and_the_coordinator_killed_at_every_step(tmp_path: Path) -> None:
    report = at_steps(tmp_path, only=None, strikes=1)
    assert report.strikes == dict.fromkeys(Step, 1)


@pytest.mark.long
@pytest.mark.parametrize("step", Step)
def test_fifty_ends_at_every_step(step: Step, tmp_path: Path) -> None:
    assert at_steps(tmp_path, only=step, strikes=50).strikes == {step: 50}


def test_f12_every_message_comes_twice_and_old_ones_again(tmp_path: Path) -> None:
    async def script(fleet: Fleet) -> None:
        fleet.broker.weather = Weather(duplicate=1.0)
        await fleet.chaos.replay()
        await fleet.sleep(60.0)

    report = simulate(small(12, faults=("replay",), every_s=2.0, script=script), tmp_path)
    assert report.audit.totals["duplicate"] > 10


def test_f13_messages_on_different_topics_overtake_each_other(tmp_path: Path) -> None:
    async def script(fleet: Fleet) -> None:
        fleet.broker.weather = Weather(reorder_s=20.0, latency_s=(0.001, 2.0))
        await fleet.sleep(100.0)

    simulate(small(13, devices=4, faults=(), script=script), tmp_path)


def test_f14_clocks_jump_by_ten_years(tmp_path: Path) -> None:
    report = simulate(
        small(14, faults=("jump", "kill-device", "kill-coordinator"), every_s=1.0, faulty_s=40.0), tmp_path
    )
    assert report.faults["jump"] > 5


async def apart_for(fleet: Fleet, seconds: float) -> None:
    """All devices, and nothing gets through meanwhile."""
    fleet.broker.partition({device.name for device in fleet.devices})
    await fleet.sleep(200.0)  # what was under way has arrived, and connections are given up
    before = fleet.broker.counts.published
    await fleet.sleep(seconds - 200.0)
    # The coordinator offers its version again, ever more rarely: a head and some chunks, hourly in the end.
    assert fleet.broker.counts.published - before <= 5 * (1 + seconds / 3600.0)


def test_f15_apart_for_minutes_and_everybody_back_at_once(tmp_path: Path) -> None:
    async def script(fleet: Fleet) -> None:
        await apart_for(fleet, 500.0)

    limits = Limits(max_queued_messages=4, keepalive_s=20.0)
    report = simulate(small(15, devices=5, faults=(), script=script, limits=limits), tmp_path)
    assert report.virtual_s > 500.0


@pytest.mark.long
def test_f15_apart_for_two_days_and_everybody_back_at_once(tmp_path: Path) -> None:
    async def script(fleet: Fleet) -> None:
        await apart_for(fleet, 2 * 86_400.0)

    limits = Limits(max_queued_messages=4)
    report = simulate(
        small(15, devices=12, faults=(), script=script, limits=limits, status_every_s=3600.0), tmp_path
    )
    assert report.virtual_s > 2 * 86_400.0


@pytest.mark.long
def test_a_day_of_partition_and_return(tmp_path: Path) -> None:
    report = simulate(long_partition(1, devices=50, hours=24.0), tmp_path)
    assert report.virtual_s == pytest.approx(86_400.0, abs=10.0)
    assert len(report.audit.updates) > 50 * 10


def test_a_short_day_of_partition_and_return(tmp_path: Path) -> None:
    report = simulate(long_partition(1, devices=2, hours=0.5, every_s=20.0), tmp_path)
    assert report.virtual_s == pytest.approx(1800.0, abs=10.0)


def test_f20_one_device_never_stops_publishing(tmp_path: Path) -> None:
    report = simulate(small(20, faults=("flood",), every_s=3.0), tmp_path)
    assert report.messages > 3 * 100


def test_f21_poison_does_not_stop_the_coordinator(tmp_path: Path) -> None:
    report = simulate(small(21, faults=("poison",), every_s=1.0), tmp_path)
    assert report.starts["coordinator"] == 1
    rejected = sum(count for name, count in report.audit.totals.items() if name.startswith("rejected:"))
    assert rejected > 30


def test_f22_a_second_coordinator_on_a_copy_of_the_directory(tmp_path: Path) -> None:
    ended: list[str] = []

    async def script(fleet: Fleet) -> None:
        rivals = [fleet.coordinator, fleet.copy_coordinator()]
        rivals[1].start()
        await fleet.sleep(30.0)
        (alive,) = [rival for rival in rivals if rival.alive]
        ended.extend(rival.name for rival in rivals if rival.gave_way is not None)
        fleet.go_on_with(alive)

    simulate(small(22, devices=3, faults=(), script=script), tmp_path)
    assert len(ended) == 1


def test_f10_disks_that_are_full_or_fail(tmp_path: Path) -> None:
    report = simulate(small(10, faults=("fill-disk", "fail-disk"), every_s=1.0), tmp_path)
    assert report.disk_failures > 0


@pytest.mark.parametrize("seed", [1, pytest.param(6, marks=pytest.mark.long)])
def test_with_fedasync_a_journal_that_keeps_little_still_has_the_bases_of_what_it_keeps(
    seed: int, tmp_path: Path
) -> None:
    changes = {
        "aggregator": FedAsync(mixing=0.5),
        "publish": Publish(min_interval_s=0.5, keep_versions=3, format=ModelFormat.FLOAT32),
        "journal": Journal(snapshot_every_updates=3, keep_bytes=1 << 12),
        "update": Update(codec="float32", retry_after_s=0.1),
    }
    report = simulate(
        small(
            seed,
            devices=5,
            faults=("kill-coordinator", "cut"),
            every_s=4.0,
            train_s=(0.5, 12.0),
            coordinator=changes,
        ),
        tmp_path,
    )
    assert report.starts["coordinator"] > 1


# What the rig would miss, it could not be trusted with.


def broken_by(what: str, scenario: Scenario, directory: Path) -> None:
    with pytest.raises(PromiseBroken, match=what) as broken:
        simulate(scenario, directory)
    assert any("repeat it: python tests/rig/simulate.py --seed" in note for note in broken.value.__notes__)


def test_it_finds_updates_that_are_applied_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "standing", lambda _mark, _counter: Standing.NEW)
    broken_by("P1|JudgedTwice", small(1, faults=("replay",), every_s=1.0), tmp_path)


def test_it_finds_an_outbox_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Outbox.put

    def put_and_lose(outbox: Outbox, counter: Any, envelope: bytes) -> Any:
        pending = put(outbox, counter, envelope)
        outbox._disk.remove(outbox._file(counter))
        return pending

    async def script(fleet: Fleet) -> None:
        fleet.broker.freeze()
        await fleet.sleep(10.0)
        for device in fleet.devices:
            device.die(End.KILLED)
            device.start()

    monkeypatch.setattr(Outbox, "put", put_and_lose)
    broken_by("P2: pump-. started without", small(1, faults=(), script=script), tmp_path)


def test_it_finds_receipts_that_come_before_the_disk_has_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedDisk, "_sync", lambda *_: None)

    async def script(fleet: Fleet) -> None:
        for _ in range(10):
            fleet.coordinator.die(End.POWER_CUT)
            fleet.coordinator.start()
            await fleet.sleep(30.0)

    broken_by("P1|P2|P3|P4|P6", small(1, faults=(), script=script), tmp_path)


def test_it_finds_a_device_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Submission, "settle", lambda *_: None)
    broken_by("P2|P6", small(1, faults=()), tmp_path)


def test_it_finds_chaos_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_chaos: Chaos) -> None:
        pass

    async def script(fleet: Fleet) -> None:
        fleet.broker.partition({fleet.devices[0].name})

    monkeypatch.setattr(Chaos, "calm", nothing)
    broken_by("P6: no receipt since .*: pump-0", small(1, faults=(), script=script), tmp_path)
