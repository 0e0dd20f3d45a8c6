"""Two coordinators of one fleet, one on a copy of the other's directory: one is left, and no receipt lied."""

import asyncio
import contextlib
import os
import shutil
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
from whole_fleet import (
    WholeFleet,
    Witness,
    applied_in_journal,
    audited,
    coordinator_here,
    make_fleet,
    simulated,
    until,
)

from coordinator.fencing import Fenced
from fedtide.coordination import open_coordinator
from fedtide.fleet_directory import FleetDirectory
from fedtide.wire.link import Traffic


@dataclass
class Running:
    """A coordinator in its own process, and where it writes."""

    fleet: WholeFleet
    process: Any

    @classmethod
    async def start(cls, fleet, *options):
        command = (sys.executable, "-m", "fedtide", "coordinator", "run", "--dir", str(fleet.directory.path))
        with log_file(fleet).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, *options, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        return cls(fleet, process)

    @property
    def lives(self):
        return self.process.returncode is None

    async def applies(self, more):
        """Wait until it has applied so many more updates."""
        target = applied_in_journal(self.fleet) + more
        await until(lambda: applied_in_journal(self.fleet) >= target, 30, lambda: log_of(self.fleet))
        assert self.lives, log_of(self.fleet)

    async def ends(self, seconds=15.0):
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    async def stop(self):
        if self.lives:
            self.process.terminate()
        return await self.ends()


def log_file(fleet):
    return fleet.directory.path / "coordinator.log"


def log_of(fleet):
    return log_file(fleet).read_text()[-4000:]


def copy_of(fleet, path):
    """A copy of the fleet's directory, as a person would make one; the coordinator has ended."""
    shutil.copytree(fleet.directory.path, path)
    copy = replace(fleet, directory=FleetDirectory(path))
    log_file(copy).write_text("")
    settings = copy.directory.settings_file
    settings.write_text(settings.read_text().replace(str(fleet.directory.path), str(path)))
    return copy


async def prepared(fleet, path):
    """The fleet has trained a little; its coordinator is stopped, and its directory copied."""
    async with coordinator_here(fleet) as (service, _):
        before = service.committer.accounting.applied
        await until(
            lambda: service.committer.accounting.applied >= before + 6, 20, lambda: service.status("running")
        )
    return copy_of(fleet, path)


def assert_receipts_are_in(witness, *fleets):
    """Every receipt is true in one of the journals, each of which is whole."""
    journals = [set(audited(fleet).updates) for fleet in fleets]
    assert witness.unsigned == 0
    assert witness.applied() <= set().union(*journals)
    return journals


@contextlib.asynccontextmanager
async def coordinator_in_this_process(fleet, *, take_over=False):
    """The service, and the task that runs it."""
    service, recovered = open_coordinator(fleet.directory, fleet.settings(), Traffic(), take_over=take_over)
    running = asyncio.create_task(service.run())
    try:
        yield service, running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        recovered.close()


async def applies(service, running, more):
    """Wait until it has applied so many more updates."""
    accounting = service.committer.accounting
    target = accounting.applied + more
    await until(lambda: accounting.applied >= target or running.done(), 20, lambda: service.status("running"))
    assert not running.done(), running


def test_a_copy_beside_a_running_coordinator_ends_until_it_is_told_to_take_over(digits, broker, tmp_path):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=4)
    witness = Witness(fleet)

    async def scenario():
        async with witness.listening(), simulated(fleet):
            copy = await prepared(fleet, tmp_path / "copy")
            copied = applied_in_journal(copy)
            async with coordinator_in_this_process(fleet) as one:
                await applies(*one, 9)  # three versions that the copy has never heard of
                async with coordinator_in_this_process(copy) as (_, two):
                    with pytest.raises(Fenced, match="has the fleet, in epoch 2; this is epoch 2"):
                        await two
                with pytest.raises(Fenced):  # as often as anything starts it again
                    open_coordinator(copy.directory, copy.settings(), Traffic())
                assert applied_in_journal(copy) == copied
                await applies(*one, 3)  # and nobody noticed

                async with coordinator_in_this_process(copy, take_over=True) as two:
                    with pytest.raises(Fenced, match="has the fleet, in epoch 3; this is epoch 2"):
                        await one[1]
                    await applies(*two, 9)  # devices take its versions: they are above those they have run
        return copy

    copy = asyncio.run(scenario())
    original, taken_over = assert_receipts_are_in(witness, fleet, copy)
    assert original - taken_over
    told = [each for each in witness.receipts if each.epoch == 3 and each.reason is None]
    assert told
    assert {(each.device, each.counter) for each in told} <= taken_over


def race(digits, broker, tmp_path, rounds):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=4)
    witness = Witness(fleet)

    async def scenario():
        copies = []
        async with witness.listening(), simulated(fleet):
            current = fleet
            for number in range(rounds):
                copy = await prepared(current, tmp_path / f"copy-{number}")
                both = await asyncio.gather(Running.start(current), Running.start(copy))
                await until(
                    lambda both=both: sum(each.lives for each in both) == 1,
                    20,
                    lambda both=both: "\n".join(log_of(each.fleet) for each in both),
                )
                (left,) = (each for each in both if each.lives)
                (gone,) = (each for each in both if not each.lives)
                assert gone.process.returncode == 1
                assert "Error: another coordinator with this key has the fleet" in log_of(gone.fleet)
                await left.applies(6)
                assert left.lives
                assert await left.stop() == 0, log_of(left.fleet)
                copies.append(gone.fleet)
                current = left.fleet
        return current, copies

    left, others = asyncio.run(scenario())
    assert_receipts_are_in(witness, left, *others)


def test_of_two_that_start_at_once_exactly_one_is_left(digits, broker, tmp_path):
    race(digits, broker, tmp_path, rounds=1)


@pytest.mark.long
def test_of_two_that_start_at_once_exactly_one_is_left_time_and_again(digits, brokers, tmp_path):
    race(digits, brokers, tmp_path, rounds=8)
