"""The coordinator's held-out evaluation: the device's runtime on examples of the operator's."""

from pathlib import Path

import numpy as np
import pytest
from hand_made import constant, line_plan, node

from coordinator.held_out import EvaluationFailed
from coordinator.plan.file import BuiltPlan
from coordinator.settings import CoordinatorSettings, Evaluation
from fedtide.coordination import held_out_evaluation
from fedtide.wire.link import Broker

INITIAL = np.zeros(4, np.float32)


def evaluation_of(plan, place):
    np.savez(place / "held-out.npz", x=np.ones((3, 2), np.float32), y=np.zeros(3, np.int64))
    settings = CoordinatorSettings(
        fleet="pumps",
        plan=Path("model.plan"),
        broker=Broker(hosts=("127.0.0.1:1883",)),
        evaluation=Evaluation(data=place / "held-out.npz"),
    )
    return held_out_evaluation(settings, BuiltPlan(plan, INITIAL))


def test_the_held_out_examples_are_evaluated(tmp_path):
    assert evaluation_of(line_plan(), tmp_path)(np.ones(4, np.float32)).loss == 2.0  # 1 × 1 + 1


def test_a_run_that_onnxruntime_stops_is_a_failed_evaluation(tmp_path):
    # Row 5 of three: found out only when it runs.
    beyond = [node("Gather x0 five -> x", axis=0)]
    plan = line_plan(before_evaluation=beyond, constants=[constant("five", [5], np.int64)])
    with pytest.raises(EvaluationFailed, match="onnxruntime stopped"):
        evaluation_of(plan, tmp_path)(INITIAL)
