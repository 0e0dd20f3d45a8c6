"""A bad model: one that is not finite is never made, one that evaluates badly is taken back."""

import asyncio
import logging
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_fleet import DEVICES, PLAN, Bench, assert_same_state, constant, make_settings, make_update
from test_coordinator_service import make, run, update

from coordinator import rollback
from coordinator.aggregation import FedAsync, FedBuff
from coordinator.journal import EvaluationResult
from coordinator.rollback import Contributors, Rollback, Standing, after, gone_back, so_far
from coordinator.server_optimizers import SGD, Adam, Momentum
from coordinator.settings import Evaluation, Publish
from coordinator.staleness import Constant
from fedtide.wire.messages import Reason, Verdict
from fedtide.wire.parameters import fingerprint

HUGE = 3e38  # finite; two of them added are not
LIMITS = Rollback(loss_factor=2.0, patience=2)


def result(version, loss=None, metric=None):
    return EvaluationResult(version, loss, metric, 0.0)


def judged(limits, *results):
    standing = Standing()
    for number, (loss, metric) in enumerate(results):
        standing = after(standing, result(number, loss, metric), limits)
    return standing


@pytest.mark.parametrize(
    ("limits", "results", "due"),
    [
        (LIMITS, [(1.0, None), (2.0, None), (2.0, None)], False),  # 2 × 1 is the limit itself
        (LIMITS, [(1.0, None), (2.1, None)], False),  # patience
        (LIMITS, [(1.0, None), (2.1, None), (2.1, None)], True),
        (LIMITS, [(1.0, None), (2.1, None), (1.5, None), (2.1, None)], False),  # not in a row
        (LIMITS, [(4.0, None), (0.5, None), (1.1, None), (1.1, None)], True),  # the lowest counts
        (LIMITS, [(-4.0, None), (0.1, None), (0.1, None)], True),  # −4 + 1 × 4 = 0
        (LIMITS, [(-4.0, None), (-0.1, None), (-0.1, None)], False),
        (LIMITS, [(1.0, None), (None, None)], True),  # not finite: at once
        (Rollback(), [(1.0, 0.9), (1e9, 0.0), (1e9, 0.0)], False),  # no limit was given
        (Rollback(metric_drop=0.1, patience=1), [(1.0, 0.9), (1.0, 0.81)], False),
        (Rollback(metric_drop=0.1, patience=1), [(1.0, 0.9), (1.0, 0.79)], True),
        (Rollback(metric_drop=0.1, patience=1), [(1.0, 0.9), (1.0, None)], True),
        (Rollback(metric_rise=0.1, patience=1), [(1.0, 0.2), (1.0, 0.31)], True),
        (Rollback(metric_rise=0.1, patience=1), [(1.0, 0.2), (1.0, 0.29), (1.0, 0.1)], False),
    ],
)
def test_so_many_bad_results_in_a_row_lead_back(limits, results, due):
    assert judged(limits, *results).due == due


def test_a_bad_result_moves_neither_the_last_good_version_nor_the_limits():
    standing = judged(LIMITS, (1.0, None), (0.8, None), (9.0, None))
    assert (standing.good, standing.lowest_loss, standing.bad) == (1, 0.8, 1)
    assert standing.why == "Version 2: loss 9 is above 2 times the lowest, 0.8"


def test_after_a_rollback_patience_begins_anew():
    standing = gone_back(judged(LIMITS, (1.0, None), (3.0, None), (3.0, None)))
    standing = after(standing, result(9, 3.0), LIMITS)
    assert (standing.due, standing.bad, standing.good) == (False, 1, 0)


@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=20))
def test_results_within_the_limits_never_lead_back(losses):
    limits = Rollback(loss_factor=2.0, patience=1)
    standing = Standing()
    for number, loss in enumerate(losses):
        standing = after(standing, result(number, 1.0 + loss / 2), limits)
        assert not standing.due
    assert standing.good == len(losses) - 1


@pytest.mark.parametrize(("line_since", "due"), [(0, True), (2, True), (3, False)])
def test_a_rollback_that_an_earlier_run_did_not_come_to_is_still_due(line_since, due):
    results = [result(0, 1.0), result(1, 3.0), result(2, 3.0)]
    assert so_far(results, LIMITS, line_since).due == due


def test_who_contributed_is_known_by_version():
    contributors = Contributors()
    for version, device in ((1, "a"), (2, "c"), (2, "b"), (3, "d")):
        contributors.note(version, device)
    assert contributors.between(1, 2) == ["b", "c"]
    assert contributors.between(0, 9) == ["a", "b", "c", "d"]
    assert contributors.between(3, 9) == []


def test_who_contributed_is_forgotten_in_the_end(monkeypatch):
    monkeypatch.setattr(rollback, "_KEPT_NAMES", 3)
    contributors = Contributors()
    for version in range(1, 10):
        contributors.note(version, f"device-{version}")
        contributors.note(version, f"device-{version}")
    assert contributors.between(0, 9) == ["device-7", "device-8", "device-9"]


def test_a_rollback_needs_something_to_go_by():
    with pytest.raises(ValueError, match=r"\[rollback\] needs an \[evaluation\] table"):
        make_settings(rollback=LIMITS)


# Not finite.


@pytest.mark.parametrize(
    ("aggregator", "optimizer"),
    [
        (FedBuff(goal=2), SGD()),  # 3e38 + 3e38
        (FedBuff(goal=2), Momentum()),
        (FedBuff(goal=2), Adam()),
        (FedAsync(mixing=0.5), SGD(learning_rate=100.0)),  # 100 × 0.5 × 3e38
        (FedAsync(mixing=0.5), Adam()),  # (1.5e38)², remembered for ever
    ],
    ids=["fedbuff-sgd", "fedbuff-momentum", "fedbuff-adam", "fedasync-sgd", "fedasync-adam"],
)
def test_the_version_that_would_not_be_finite_has_the_parameters_before(
    tmp_path, aggregator, optimizer, caplog
):
    bench = Bench(tmp_path, make_settings(aggregator=aggregator, server_optimizer=optimizer))
    devices = DEVICES[: aggregator.goal]
    bench.send(*(make_update(constant(1e-3), counter=1, device=device) for device in devices))
    before = bench.state.parameters
    assert bench.state.version == 1
    with caplog.at_level(logging.ERROR):
        bench.send(*(make_update(constant(HUGE), counter=2, device=device) for device in devices))
    assert bench.state.version == 2
    assert bench.state.parameters.tobytes() == before.tobytes()
    assert all(np.isfinite(each).all() for each in bench.state.optimizer.vectors)
    last = bench.writer.rollbacks.last
    assert (bench.writer.rollbacks.count, last.version, last.good, last.devices) == (1, 2, 1, devices)
    assert "Version 2 would not have been finite" in caplog.text

    receipts = bench.send(*(make_update(constant(1e-3), counter=3, device=device) for device in devices))
    assert [receipt.verdict for receipt in receipts] == [Verdict.APPLIED] * len(devices)
    assert bench.state.version == 3
    assert bench.state.parameters.tobytes() != before.tobytes()
    assert_same_state(bench.replay_from_start(), bench.state)
    bench.close()


def test_a_flush_of_a_buffer_that_overflows_changes_nothing(tmp_path):
    bench = Bench(tmp_path, make_settings(aggregator=FedBuff(goal=9), staleness=Constant()))
    for counter in (1, 2):
        bench.send(make_update(constant(HUGE), counter=counter))
    bench.journal.commit(bench.writer.flush())
    assert bench.state.version == 1
    assert fingerprint(bench.state.parameters) == fingerprint(PLAN.initial)
    assert_same_state(bench.replay_from_start(), bench.state)
    assert bench.writer.rollbacks.last.good == 0
    bench.close()


# Bad, by evaluation.


@dataclass(frozen=True)
class Outcome:
    loss: float
    metric: float | None = None


def distance(parameters):
    """Honest updates lead the first parameter from 0 to 1, 2, …; 1 is where the loss is lowest."""
    return Outcome(loss=1.0 + abs(float(parameters[0]) - 1.0))


def watched(tmp_path, **limits):
    return make(
        evaluation=Evaluation(data=tmp_path),
        rollback=Rollback(**limits),
        staleness=Constant(),
    )


async def settled(fleet, counter, **changes):
    """Send one update and wait until the version it made was evaluated."""
    before = version_of(fleet)
    fleet.send(update(counter, **changes))
    await until(lambda: any(point.version > before for point in fleet.service._held_out.points))


def version_of(fleet):
    return fleet.service.committer.committed.version


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_versions_that_evaluate_badly_are_taken_back_within_patience(tmp_path, caplog):
    async def scenario(fleet, _running):
        await until(lambda: fleet.service._held_out.points)  # version 0: loss 2
        await settled(fleet, 1)  # version 1: loss 1
        good = fleet.service.committer.committed.parameters
        await settled(fleet, 2, delta=constant(50.0))  # version 2: loss 51, bad
        assert version_of(fleet) == 2
        await settled(fleet, 3, device=DEVICES[1])  # version 3: loss 52, bad again
        await until(lambda: version_of(fleet) == 4)
        assert fleet.service.committer.committed.parameters.tobytes() == good.tobytes()
        await until(lambda: fleet.heads()[-1].version == 4)
        assert fleet.heads()[-1].parameters_sha256 == fingerprint(good)

        # What was learned on a version that was taken back does not count; from the new one it does.
        fleet.send(update(4, base_version=3, base_sha256=fleet.heads()[-2].parameters_sha256))
        await until(lambda: fleet.received(DEVICES[0])[-1].counter == 4)
        assert fleet.received(DEVICES[0])[-1].reason is Reason.UNKNOWN_BASE
        fleet.send(update(5, base_version=4, base_sha256=fingerprint(good)))
        await until(lambda: version_of(fleet) == 5)
        return fleet.service.status("running")

    with caplog.at_level(logging.ERROR):
        fleet = run(tmp_path, watched(tmp_path, loss_factor=3.0, patience=2), scenario, evaluate=distance)
    seen = fleet.outcome
    assert seen.rollbacks == 1
    assert (seen.last_rollback.version, seen.last_rollback.good) == (4, 1)
    assert seen.last_rollback.devices == (DEVICES[0], DEVICES[1])
    assert (
        "Version 4 has the parameters of version 1 again. Version 3: loss 52 is above 3 times" in caplog.text
    )
    assert f"{DEVICES[0]}, {DEVICES[1]}" in caplog.text
    assert_replays(tmp_path, fleet)


def assert_replays(tmp_path, fleet):
    """From the first entry on, the journal gives what was live."""
    bench = Bench(tmp_path / "state", fleet.settings)
    assert_same_state(bench.replay_from_start(), bench.state)
    assert bench.state.parameters.tobytes() == fleet.service.committer.committed.parameters.tobytes()
    bench.close()


def test_a_loss_that_is_not_finite_leads_back_at_once(tmp_path):
    def evaluate(parameters):
        return Outcome(loss=float("nan") if parameters[0] > 10 else 1.0)

    async def scenario(fleet, _running):
        await until(lambda: fleet.service._held_out.points)
        fleet.send(update(1, delta=constant(1e30)))
        await until(lambda: version_of(fleet) == 2)
        assert fleet.service.committer.committed.parameters.tobytes() == PLAN.initial.tobytes()
        await until(lambda: fleet.heads()[-1].version == 2)

    fleet = run(tmp_path, watched(tmp_path, patience=5), scenario, evaluate=evaluate)
    assert fleet.heads()[-1].parameters_sha256 == fingerprint(PLAN.initial)


@pytest.mark.parametrize("form", ["grid", "float32"])
def test_devices_get_the_good_version_to_the_bit_however_far_the_bad_one_was(tmp_path, form):
    def evaluate(parameters):
        return Outcome(loss=float("inf") if np.abs(parameters).max() > 1e6 else 1.0)

    async def scenario(fleet, _running):
        await until(lambda: fleet.service._held_out.points)
        good = fleet.heads()[-1].parameters_sha256
        fleet.send(update(1, delta=constant(1e9), base_sha256=good))
        await until(lambda: fleet.heads()[-1].version == 2)
        assert [head.parameters_sha256 == good for head in fleet.heads()[-2:]] == [False, True]

    settings = make_settings(
        aggregator=FedBuff(goal=1),
        publish=Publish(min_interval_s=0.0, format=form),
        evaluation=Evaluation(data=tmp_path),
        rollback=Rollback(),
    )
    run(tmp_path, settings, scenario, evaluate=evaluate)


def test_a_rollback_that_a_kill_came_before_is_made_up_for_at_the_next_start(tmp_path):
    settings = watched(tmp_path, loss_factor=3.0, patience=1)
    bench = Bench(tmp_path / "state", settings)
    bench.send(make_update(constant(50.0)))
    bench.publish()
    bench.journal.add_evaluation(result(0, 1.0))
    bench.journal.add_evaluation(result(1, 51.0))
    bench.close()

    async def scenario(fleet, _running):
        await until(lambda: version_of(fleet) == 2)
        assert fleet.service.committer.committed.parameters.tobytes() == PLAN.initial.tobytes()

    run(tmp_path, settings, scenario, evaluate=lambda _: Outcome(1.0))


def test_without_a_good_version_there_is_nothing_to_go_back_to(tmp_path, caplog):
    async def scenario(fleet, _running):
        await until(lambda: fleet.service._held_out.points)
        await until(lambda: "no good version is kept to go back to" in caplog.text)
        fleet.send(update(1))
        await until(lambda: version_of(fleet) == 1)  # and training goes on

    run(tmp_path, watched(tmp_path), scenario, evaluate=lambda _: Outcome(float("nan")))


def test_a_result_that_a_restart_gives_once_more_does_not_count_twice(tmp_path):
    settings = watched(tmp_path, loss_factor=3.0, patience=2)
    bench = Bench(tmp_path / "state", settings)
    bench.send(make_update(constant(50.0)))
    bench.publish()
    bench.journal.add_evaluation(result(0, 1.0))
    bench.journal.add_evaluation(result(1, 51.0))
    bench.close()

    async def scenario(fleet, _running):
        await until(lambda: fleet.service._held_out.points)  # of version 1 again: loss 50
        await asyncio.sleep(0)
        assert version_of(fleet) == 1
        fleet.send(update(2, base_version=1, base_sha256=fleet.heads()[-1].parameters_sha256))
        await until(lambda: version_of(fleet) == 3)  # version 2 is the second bad one
        assert fleet.service.committer.committed.parameters.tobytes() == PLAN.initial.tobytes()

    fleet = run(tmp_path, settings, scenario, evaluate=distance)
    assert [point.version for point in fleet.service._held_out.points][:2] == [1, 2]


def test_a_version_that_is_put_on_record_while_the_model_is_reset_is_no_base_afterwards(tmp_path):
    async def scenario(fleet, _running):
        saving, go_on, saved = asyncio.Event(), threading.Event(), []
        save, loop = fleet.service._versions.save, asyncio.get_running_loop()

        def held_up(version):
            if version.number == 1:
                saved.append(version)
                loop.call_soon_threadsafe(saving.set)
                go_on.wait()
            save(version)

        fleet.service._versions.save = held_up
        fleet.send(update(1))
        await saving.wait()
        resetting = asyncio.create_task(fleet.service.committer.reset("a test says so"))
        await until(lambda: fleet.service._writer.state.version == 2)
        go_on.set()
        assert await resetting == 2
        fleet.send(update(2, base_version=1, base_sha256=saved[0].fingerprint))
        await until(lambda: fleet.received(DEVICES[0])[-1].counter == 2)
        return fleet.received(DEVICES[0])[-1]

    receipt = run(tmp_path, make(), scenario).outcome
    assert (receipt.verdict, receipt.reason) == (Verdict.REJECTED, Reason.UNKNOWN_BASE)
