import errno
from pathlib import Path

import pytest
from simulated_disk import SimulatedDisk, full

from edge_agent.plan_guard import PlanRefused
from edge_agent.plan_trial import MOST_TRIALS, PlanTrial
from fedtide.wire.ids import PlanId

PLAN, ANOTHER = PlanId("aa" * 16), PlanId("bb" * 16)


def killed(path: Path, plan: PlanId = PLAN) -> None:
    """The process ends in the middle of an update: nothing after the yield is ever run."""
    update = PlanTrial(path).update(plan)
    update.__enter__()
    _left.append(update)


_left: list[object] = []
"""Updates that nobody finishes; collecting them would run their ends."""


def test_a_plan_that_ended_the_agent_three_times_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    for _ in range(MOST_TRIALS):
        killed(path)
    with (
        pytest.raises(PlanRefused, match=r"ended 3 times in a first update.*not tried again"),
        PlanTrial(path).update(PLAN),
    ):
        pass


def test_a_plan_whose_evaluation_ended_the_agent_three_times_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    for _ in range(MOST_TRIALS):
        evaluation = PlanTrial(path).evaluation(PLAN)
        evaluation.__enter__()
        _left.append(evaluation)
    with pytest.raises(PlanRefused, match="ended 3 times"):
        PlanTrial(path).check(PLAN)


def test_an_evaluation_that_ends_well_leaves_the_first_update_a_trial(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    with PlanTrial(path).evaluation(PLAN):
        pass
    for _ in range(MOST_TRIALS):
        killed(path)
    with pytest.raises(PlanRefused, match="ended 3 times"):
        PlanTrial(path).check(PLAN)


def test_another_plan_is_tried(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    for _ in range(MOST_TRIALS):
        killed(path)
    with PlanTrial(path).update(ANOTHER):
        pass
    PlanTrial(path).check(ANOTHER)


def test_a_plan_that_passed_may_end_the_agent_as_often_as_the_power_fails(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    killed(path)
    with PlanTrial(path).update(PLAN):
        pass
    for _ in range(MOST_TRIALS + 1):
        killed(path)
    PlanTrial(path).check(PLAN)


def test_errors_and_stops_that_the_agent_survives_do_not_count(tmp_path: Path) -> None:
    trial = PlanTrial(tmp_path / "trial")
    for error in (ValueError, KeyboardInterrupt, PlanRefused, ValueError):
        with pytest.raises(error), trial.update(PLAN):
            raise error
    PlanTrial(tmp_path / "trial").check(PLAN)


def test_a_plan_that_passed_is_not_written_about_again(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    trial = PlanTrial(path)
    with trial.update(PLAN):
        pass
    path.unlink()
    with trial.update(PLAN):
        pass
    assert not path.exists()


def test_a_refused_plan_stays_refused_over_restarts_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    PlanTrial(path).refuse(PLAN, "it did not stop")
    with pytest.raises(PlanRefused, match="it did not stop; the plan is not tried again"):
        PlanTrial(path).check(PLAN)
    PlanTrial(path).check(ANOTHER)


def test_a_damaged_note_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trial"
    path.write_bytes(b"\xff nonsense")
    PlanTrial(path).check(PLAN)
    assert "damaged and left out" in caplog.text


def test_a_full_disk_is_no_end_of_a_trial() -> None:
    disk, path = SimulatedDisk(), Path("/trial")
    trial = PlanTrial(path, disk)
    for _ in range(MOST_TRIALS + 1):
        disk.fail(full)
        with pytest.raises(OSError, match="No space left"), trial.update(PLAN):
            raise AssertionError("what was not noted must not be begun")
        disk.fail(None)
        with pytest.raises(OSError, match="No space left"), trial.update(PLAN):
            disk.fail(full)
    disk.fail(None)
    trial.check(PLAN)
    PlanTrial(path, disk).check(PLAN)


def test_a_note_that_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    disk, path = SimulatedDisk(), Path("/trial")
    PlanTrial(path, disk).refuse(PLAN, "it did not stop")
    disk.fail(lambda _: errno.EIO)
    PlanTrial(path, disk).check(PLAN)
    assert "Input/output error" in caplog.text
