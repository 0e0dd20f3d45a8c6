"""``fedtide journal``: what it says, and its exit codes."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from coordinator.aggregation import FedBuff
from coordinator.entries import FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal import Counted, Journal
from coordinator.model_state import initial_state, reset_state
from coordinator.recovery import lock_directory
from coordinator.server_optimizers import SGD
from coordinator.settings import Rules
from fedtide.cli.journal import journal
from fedtide.wire.parameters import Schema, TensorSpec, to_bytes

SCHEMA = Schema(tensors=(TensorSpec(name="p", dtype="float32", shape=(2,)),))
INITIAL = np.array([1, 2], np.float32)
RULES = Rules(aggregator=FedBuff(goal=2), server_optimizer=SGD())


@pytest.fixture
def fleet(tmp_path):
    """A journal of two segments; its updates were never meant to be replayed."""
    opened = Journal(tmp_path / "state" / "journal")
    opened.add(RulesEntry(RULES), ResetEntry("a" * 32, SCHEMA, 0, to_bytes(INITIAL), "a new fleet"))
    opened.add(
        *(UpdateEntry("pump-1", counter, 0, 0.5, 1.0, b"envelope %d" % counter, 0) for counter in (1, 2))
    )
    state = reset_state(initial_state(INITIAL, RULES), 1, INITIAL)
    opened.snapshot(state)
    opened.add(UpdateEntry("pump-2", 7, 1, 1.0, 2.0, b"envelope 7", 0), Counted("duplicate", 3))
    opened.add(FlushEntry())
    opened.close()
    return tmp_path


def run(command, fleet, *options):
    return CliRunner().invoke(journal, [command, "--dir", str(fleet), *options])


def spoil(fleet, offset, count=8):
    path = max((fleet / "state" / "journal").glob("*.segment"))
    content = bytearray(path.read_bytes())
    for place in range(offset, offset + count):
        content[place] ^= 0x5A
    path.write_bytes(bytes(content))
    return path


def test_a_whole_journal_verifies(fleet):
    done = run("verify", fleet)
    assert done.exit_code == 0
    assert "Whole: 6 entries; updates: 3 applied, 3 duplicate." in done.output
    assert "records         5 to         7" in done.output


def test_damage_is_told_with_its_place_and_the_exit_code_is_one(fleet):
    path = spoil(fleet, 120)
    done = run("verify", fleet)
    assert done.exit_code == 1
    assert f"Damage: {path}, byte 60, record 5: the body does not have its checksum" in done.output
    assert "fedtide journal repair" in done.output


def test_verification_for_machines(fleet):
    found = json.loads(run("verify", fleet, "--json").output)
    assert found["whole"] is True
    assert found["totals"] == {"applied": 3, "duplicate": 3}
    assert [(segment["first"], segment["last"]) for segment in found["segments"]] == [(1, 4), (5, 7)]
    path = spoil(fleet, 120)
    found = json.loads(run("verify", fleet, "--json").output)
    (damage,) = found["damages"]
    assert (damage["file"], damage["offset"], damage["sequence"]) == (str(path), 60, 5)


def test_it_works_beside_a_running_coordinator(fleet):
    lock = lock_directory(fleet / "state")
    assert run("verify", fleet).exit_code == 0
    assert run("export", fleet).exit_code == 0
    os.close(lock)


def test_export_writes_each_entry_as_a_line(fleet, tmp_path):
    done = run("export", fleet, "--envelopes", str(tmp_path / "updates"))
    lines = [json.loads(line) for line in done.output.splitlines()]
    assert [line["kind"] for line in lines] == ["rules", "reset", "update", "update", "update", "flush"]
    assert [line["version"] for line in lines] == [0, 0, 0, 1, 1, 2]
    assert lines[3] == {
        "sequence": 4, "kind": "update", "version": 1, "device": "pump-1", "counter": 2, "base_version": 0,
        "staleness": 0, "staleness_weight": 0.5, "importance": 1.0, "bytes": 10,
        "sha256": hashlib.sha256(b"envelope 2").hexdigest(),
    }  # fmt: skip
    written = sorted(file.name for file in (tmp_path / "updates").iterdir())
    assert written == [
        "000000000003-pump-1-1.envelope",
        "000000000004-pump-1-2.envelope",
        "000000000005-pump-2-7.envelope",
    ]
    assert (tmp_path / "updates" / written[2]).read_bytes() == b"envelope 7"


def test_a_single_wrong_bit_is_repaired(fleet):
    path = min((fleet / "state" / "journal").glob("*.segment"))
    whole = path.read_bytes()
    content = bytearray(whole)
    content[150] ^= 1
    path.write_bytes(bytes(content))
    done = run("repair", fleet)
    assert done.exit_code == 0
    assert "Damaged places: 1; single bits put right: 1." in done.output
    assert "No update was lost and the model is as it was." in done.output
    assert path.read_bytes() == whole


def test_a_repair_lists_what_counts_no_more(fleet):
    spoil(fleet, 120)
    found = json.loads(run("repair", fleet, "--json").stdout)
    assert found["version"] == 2
    assert found["lost"] == []
    assert found["unreadable"] == 1  # the update itself, which is what was damaged
    assert run("verify", fleet).exit_code == 0


def test_beside_a_running_coordinator_nothing_is_repaired(fleet):
    lock = lock_directory(fleet / "state")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedtide", "journal", "repair", "--dir", str(fleet)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: another coordinator is running" in done.stderr
    os.close(lock)


@pytest.mark.parametrize("command", ["verify", "replay", "repair", "export"])
def test_without_a_journal_each_command_says_what_makes_one(tmp_path, command):
    done = run(command, tmp_path)
    assert done.exit_code == 1
    assert "fedtide coordinator run" in done.output
