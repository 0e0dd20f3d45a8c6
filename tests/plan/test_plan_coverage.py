import os

import pytest
from plan_coverage import CASES, OPTIONS, listed, row, write

from coordinator.plan.build import build
from edge_agent.plan_guard import check

WRITES = bool(os.environ.get("FEDTIDE_WRITE_COVERAGE"))
QUICK = (
    "MLP / Adamax / cross-entropy / ",
    "MLP / SGD / Huber / ",
    "embedding / SGD, momentum / cross-entropy / shared parameter",
)


def marked(case):
    return pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.long)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_case_of_the_table_builds(case):
    task = case.task()
    built = build(task)
    check(built.plan)
    verified = built.plan.manifest.verified
    assert verified.median_gradient_error <= 2e-6
    assert verified.max_gradient_error <= max(1e-5, 3 * verified.torch_float32_max_error)
    if WRITES:
        write({case.name: row(case, built, task)})


def test_the_table_lists_exactly_what_is_tested():
    if WRITES:
        pytest.skip("the table is being written")
    assert list(listed()) == [case.name for case in CASES]
    assert set(QUICK) < set(listed())


def test_each_option_of_a_task_is_in_the_table():
    assert {"dropout", "frozen layer", "proximal term", "clipping", "class weights", "local buffers"} < set(
        OPTIONS
    )
