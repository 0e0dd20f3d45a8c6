"""``fedtide journal replay``: every version and every snapshot comes out again, or it says which does not."""

import json

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from small_fleet import Bench, constant, make_settings, make_update

from coordinator.aggregation import FedAsync, FedBuff
from coordinator.audit import audit
from coordinator.journal import Published
from coordinator.replay import ReplayMismatch
from coordinator.server_optimizers import Momentum
from coordinator.settings import Journal, Publish
from fedtide.cli.journal import journal

SETTINGS = make_settings(aggregator=FedBuff(goal=2), server_optimizer=Momentum())


def a_run(directory, settings=SETTINGS, *, parts=3, snapshots=True):
    bench, counter = Bench(directory, settings), 0
    for _ in range(parts):
        for _ in range(5):
            counter += 1
            base = max(bench.writer.published)
            bench.send(
                make_update(
                    constant(counter / 8),
                    counter=counter,
                    base_version=base,
                    base_sha256=bench.writer.published[base],
                )
            )
            bench.publish()
        if snapshots:
            bench.snapshot()
    return bench


def test_everything_that_is_kept_is_replayed(tmp_path):
    bench = a_run(tmp_path)
    done = audit(bench.journal, bench.recovered.models.base)
    assert (done.since, done.entries, done.snapshots, done.version) == (0, 2 + 15, 3, 7)
    assert done.versions == 7  # version 0 is what the first entries say
    bench.close()


def test_what_is_no_longer_kept_is_not_asked_for(tmp_path):
    bench = a_run(tmp_path, msgspec.structs.replace(SETTINGS, journal=Journal(keep_bytes=1)))
    done = audit(bench.journal, bench.recovered.models.base)
    assert (done.entries, done.snapshots, done.version) == (5, 1, 7)
    assert done.since == bench.journal.oldest - 1
    bench.close()


def test_where_a_base_is_gone_the_replay_begins_at_a_later_snapshot(tmp_path):
    """FedAsync; the oldest snapshot would need versions from before it."""
    settings = make_settings(
        aggregator=FedAsync(mixing=0.5), publish=Publish(keep_versions=2), journal=Journal(keep_bytes=1)
    )
    bench = a_run(tmp_path, settings)
    done = audit(bench.journal, bench.recovered.models.base)
    assert done.version == 15
    bench.close()


def test_a_published_version_that_does_not_come_out_again_is_told(tmp_path):
    bench = a_run(tmp_path)
    bench.journal.add_published(Published(3, b"\x55" * 32, 0.0), keep=100)
    with pytest.raises(ReplayMismatch, match="other parameters for version 3 than were published"):
        audit(bench.journal, bench.recovered.models.base)
    bench.close()


def test_a_snapshot_that_does_not_come_out_again_is_told(tmp_path):
    bench = a_run(tmp_path, snapshots=False)
    state = bench.state
    wrong = state.buffer.total + np.float32(0.125)
    changed = type(state.buffer)(wrong, state.buffer.divisor, state.buffer.count)
    bench.journal.snapshot(
        type(state)(state.version, state.parameters, changed, state.optimizer, state.rules)
    )
    with pytest.raises(ReplayMismatch, match=r"another buffer after record \d+ than its snapshot has"):
        audit(bench.journal, bench.recovered.models.base)
    bench.close()


def test_the_command_says_what_it_compared(tmp_path):
    a_run(tmp_path / "state").close()
    done = CliRunner().invoke(journal, ["replay", "--dir", str(tmp_path)])
    assert done.exit_code == 0
    assert "Replayed 17 entries after record 0" in done.output
    assert (
        "7 published versions and 3 snapshots came out the same to the bit; the newest version is 7"
        in done.output
    )
    found = json.loads(CliRunner().invoke(journal, ["replay", "--dir", str(tmp_path), "--json"]).output)
    assert (found["entries"], found["versions"], found["snapshots"], found["version"]) == (17, 7, 3, 7)
