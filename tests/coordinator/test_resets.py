"""Resets: another plan, or other parameters of the same one. What was before counts no more."""

import os

import msgspec
import numpy as np
import pytest
from simulated_disk import SimulatedDisk
from small_fleet import (
    DEVICES,
    PLAN,
    SCHEMA,
    Bench,
    assert_same_state,
    constant,
    device_key,
    float32,
    make_header,
    make_settings,
    make_update,
    vector,
)

from coordinator import recovery
from coordinator.aggregation import FedAsync, FedBuff
from coordinator.audit import audit, numbered
from coordinator.entries import FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal import History
from coordinator.journal.check import verify
from coordinator.model_store import ModelStore, StoredRelease
from coordinator.plan.file import BuiltPlan
from coordinator.server_optimizers import Momentum
from fedtide.wire import codecs
from fedtide.wire.envelope import seal_update
from fedtide.wire.messages import Reason, Verdict
from fedtide.wire.parameters import Schema, fingerprint
from fedtide.wire.plan import Plan

SETTINGS = make_settings(aggregator=FedBuff(goal=2), server_optimizer=Momentum())


def other_plan(schema=None, initial=None):
    """A plan of three parameters, which start from −1."""
    schema = schema or Schema(tensors=(float32("q.weight", 3),))
    manifest = msgspec.structs.replace(PLAN.plan.manifest, name="other", schema=schema)
    return BuiltPlan(
        Plan(manifest, train=b"", evaluation=b""), vector(-1, -1, -1) if initial is None else initial
    )


OTHER = other_plan()


def old_run(directory, settings=SETTINGS, disk=None, updates=5):
    """Two versions and one update in the buffer."""
    bench = Bench(directory, settings, **({} if disk is None else {"disk": disk}))
    for counter in range(1, updates + 1):
        bench.send(make_update(constant(1.0), counter=counter))
        bench.publish()
    return bench


def entries(bench):
    return [entry for _, entry in bench.journal.entries_after(0)]


@pytest.mark.parametrize("end", ["shutdown", "kill"])
def test_another_plan_closes_the_buffer_and_begins_with_its_own_parameters(tmp_path, end):
    old = old_run(tmp_path)
    if end == "shutdown":
        old.snapshot()
    old.close()
    new = Bench(tmp_path, SETTINGS, OTHER)
    *_, flush, reset = entries(new)[:9]
    assert isinstance(flush, FlushEntry)
    assert (reset.plan, reset.version, reset.schema) == (OTHER.plan.id, 4, OTHER.plan.manifest.schema)
    assert f"plan {PLAN.plan.id} gave way to plan {OTHER.plan.id}" in reset.why
    assert new.state.version == 4  # 2 had been made, the buffer became 3
    assert new.state.parameters.tolist() == [-1, -1, -1]
    assert new.state.buffer.count == 0
    assert [vector.tolist() for vector in new.state.optimizer.vectors] == [[0, 0, 0]]
    assert max(new.writer.published) == 4
    new.close()


def test_the_old_plans_last_version_is_what_its_updates_make(tmp_path):
    old_run(tmp_path).close()
    Bench(tmp_path, SETTINGS, OTHER).close()
    seen = [(each.version, type(each.entry).__name__) for each in numbered(History(tmp_path / "journal"))]
    assert seen == [
        (0, "RulesEntry"), (0, "ResetEntry"),
        (0, "UpdateEntry"), (1, "UpdateEntry"), (1, "UpdateEntry"), (2, "UpdateEntry"), (2, "UpdateEntry"),
        (3, "FlushEntry"), (4, "ResetEntry"),
    ]  # fmt: skip


def test_updates_of_the_old_plan_are_refused_and_nothing_of_two_plans_is_mixed(tmp_path):
    old = old_run(tmp_path)
    old.close()
    new = Bench(tmp_path, SETTINGS, OTHER)
    (late,) = new.send(make_update(counter=6))
    assert (late.verdict, late.reason) == (Verdict.REJECTED, Reason.UNKNOWN_PLAN)
    again = make_update(counter=5)  # its receipt was lost when the plan changed
    assert new.send(again)[0].verdict is Verdict.DUPLICATE
    assert (new.state.version, new.state.buffer.count) == (4, 0)
    assert new.journal.marks()[DEVICES[0]].applied == 5
    new.close()


def test_the_old_plans_models_are_neither_bases_nor_released_nor_on_disk(tmp_path):
    old = old_run(tmp_path)
    old.recovered.models.save_release(StoredRelease(2, old.state.parameters, "every version"))
    old.close()
    new = Bench(tmp_path, SETTINGS, OTHER)
    assert [row.version for row in new.journal.published()] == [4]
    assert sorted(int(file.stem) for file in (tmp_path / "models").iterdir()) == [4]
    assert new.recovered.models.release() is None
    new.close()


def three(counter, base_version, base_sha256):
    """An update of the other plan: the payload has three numbers."""
    payload = codecs.get("float32").encode(np.full(3, counter, np.float32), OTHER.plan.manifest.schema)
    header = make_header(
        payload, counter=counter, plan=OTHER.plan.id, base_version=base_version, base_sha256=base_sha256
    )
    return seal_update(header, payload, device_key(header.device))


@pytest.mark.parametrize("settings", [SETTINGS, make_settings(aggregator=FedAsync(mixing=0.5))])
def test_after_a_change_of_plan_everything_is_recovered(tmp_path, settings):
    old_run(tmp_path, settings).close()
    new = Bench(tmp_path, settings, OTHER)
    first = max(new.writer.published)
    for counter in range(11, 16):
        (receipt,) = new.send(three(counter, first, new.writer.published[first]))
        assert receipt.verdict is Verdict.APPLIED
        new.publish()
    live = new.state
    new.close()
    again = Bench(tmp_path, settings, OTHER)
    assert again.recovered.replayed == 5
    assert_same_state(again.state, live)
    assert verify(tmp_path / "journal").damages == []
    again.close()


def test_a_journal_of_two_plans_replays_from_its_first_record(tmp_path):
    old_run(tmp_path).close()
    new = Bench(tmp_path, SETTINGS, OTHER)
    for counter in range(11, 16):
        (receipt,) = new.send(three(counter, 4, new.writer.published[4]))
        assert receipt.verdict is Verdict.APPLIED
        new.publish()
    new.snapshot()
    live = new.state
    done = audit(new.journal, new.recovered.models.base)
    assert (done.since, done.version, done.snapshots) == (0, live.version, 2)
    assert done.versions >= 2
    new.close()
    again = Bench(tmp_path, SETTINGS, OTHER)
    assert_same_state(again.state, live)
    again.close()


def test_the_old_plan_set_again_is_a_new_beginning(tmp_path):
    old_run(tmp_path).close()
    Bench(tmp_path, SETTINGS, OTHER).close()
    back = Bench(tmp_path, SETTINGS)
    assert (back.state.version, back.state.parameters.tolist()) == (5, list(range(8)))
    back.close()


def test_a_power_cut_at_any_moment_of_a_change_of_plan_leaves_one_plan_or_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "lock_directory", lambda _directory: os.open(os.devnull, os.O_RDONLY))
    disk, left, rng = SimulatedDisk(), [], np.random.default_rng(1)
    old_run(tmp_path, disk=disk).close()
    disk.watch(lambda _operation: left.extend(disk.crash_states(rng, most=4)))
    recovery.recover(tmp_path, SETTINGS, OTHER, disk).close()
    disk.watch(None)
    plans = set()
    for state in left:
        plans.add(History(tmp_path / "journal", state).ledger.plan)
        recovered = recovery.recover(tmp_path, SETTINGS, OTHER, state)
        assert (recovered.state.version, recovered.state.parameters.tolist()) == (4, [-1, -1, -1])
        assert recovered.models.newest() == 0
        recovered.close()
    assert plans == {PLAN.plan.id, OTHER.plan.id}
    assert len(left) > 50


def test_a_rolled_back_model_goes_on_under_a_higher_version(tmp_path):
    bench = old_run(tmp_path, updates=4)
    good = bench.recovered.models.parameters(1)
    bench.journal.commit(bench.writer.reset(3, good, "version 2 is worse than version 1"))
    assert (bench.state.version, bench.state.parameters.tobytes()) == (3, good.tobytes())
    assert bench.writer.published == {}
    (stale,) = bench.send(make_update(counter=9, base_version=2, base_sha256=b"\0" * 32))
    assert (stale.verdict, stale.reason) == (Verdict.REJECTED, Reason.UNKNOWN_BASE)
    bench.publish()
    fresh = make_update(counter=10, base_version=3, base_sha256=fingerprint(good))
    assert bench.send(fresh)[0].verdict is Verdict.APPLIED
    live = bench.state
    bench.close()
    again = Bench(tmp_path, SETTINGS)
    assert_same_state(again.state, live)
    assert again.recovered.replayed == 2  # the reset and what came after it
    assert audit(again.journal, again.recovered.models.base).version == 3
    again.close()


def test_a_reset_to_a_version_that_devices_may_have_seen_is_refused(tmp_path):
    bench = old_run(tmp_path, updates=4)
    with pytest.raises(ValueError, match="a reset to version 2; devices were offered version 2"):
        bench.journal.commit(bench.writer.reset(2, constant(0.0), "by mistake"))
    bench.close()


def test_rules_that_change_with_the_plan_hold_from_the_new_one_on(tmp_path):
    old_run(tmp_path).close()
    after = make_settings(aggregator=FedBuff(goal=3))
    new = Bench(tmp_path, after, OTHER)
    assert new.state.rules.aggregator.goal == 3
    kinds = [type(entry) for entry in entries(new)]
    assert kinds[-3:] == [FlushEntry, RulesEntry, ResetEntry]
    assert kinds.count(UpdateEntry) == 5
    new.close()
    again = Bench(tmp_path, after, OTHER)
    assert_same_state(again.state, new.state)
    again.close()


def test_models_of_before_a_version_are_forgotten(tmp_path):
    models = ModelStore(tmp_path / "models", SCHEMA, 10)
    for version in (1, 2, 3):
        models.save(version, constant(float(version)), exact=constant(0.5))
    models.save_release(StoredRelease(3, constant(3.0), "gate"))
    models.forget_before(3)
    assert [int(file.stem) for file in (tmp_path / "models").iterdir()] == [3]
    assert [int(file.stem) for file in (tmp_path / "exact").iterdir()] == [3]
    assert models.release().version == 3
    models.forget_before(4)
    assert models.release() is None
