"""Plans that take too much: stopped with a sentence that says what would help, and the process lives on."""

import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hand_made import constant, line_plan, node

from edge_agent import plan_session
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import (
    Evaluator,
    MemoryLimitExceeded,
    PlanRefused,
    StepDeadlineExceeded,
    Trainer,
)
from fedtide.wire.plan import Limits
from fedtide.wire.training import Training

MIB = 1 << 20
BASE = np.zeros(4, np.float32)
EXAMPLES = Dataset((np.ones((4, 2), np.float32),), np.zeros(4, np.int64))
TRAINING = Training(batch_size=4)


def train(trainer, dataset=EXAMPLES):
    return trainer.run_epochs(BASE, dataset, TRAINING, np.random.default_rng(1))


def doublings(count, start="x0"):
    """Concat a tensor with itself, again and again: 2^count rows of each."""
    names = [start, *(f"d{index}" for index in range(count - 1)), "x"]
    return [node(f"Concat {a} {a} -> {b}", axis=0) for a, b in pairwise(names)]


def products(count, size):
    """A chain of matrix products, size × size each, 2 * count * size^3 operations, whose result is x0."""
    chain = [node("ConstantOfShape shape -> c0"), node("ReduceSum x0 -> sum", keepdims=0)]
    chain += [
        node("Mul sum tiny -> start"),
        node("Add c0 start -> m0"),  # depends on the batch, so that it is not computed when opening
        *(node(f"MatMul m{index} m0 -> m{index + 1}") for index in range(count)),
        node(f"ReduceSum m{count} -> total", keepdims=0),
        node("Mul total tiny -> nothing"),
        node("Add x0 nothing -> x"),
    ]
    return {"before": chain, "constants": [constant("shape", [size, size], np.int64), constant("tiny", 0.0)]}


def resident_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_a_step_beyond_the_memory_limit_is_stopped():
    # 4 rows of 8 bytes, doubled 24 times, are 512 MiB; half as much before that.
    trainer = Trainer(line_plan(before=doublings(24), limits=Limits(memory_bytes=64 * MIB)))
    before = resident_mib()
    with pytest.raises(
        MemoryLimitExceeded, match=r"the 64 MiB .* a higher memory_bytes in the plan's limits"
    ):
        train(trainer)
    assert resident_mib() - before < 80
    trainer = Trainer(line_plan())
    assert train(trainer).steps == 1  # the process lives on


def test_the_same_plan_runs_where_the_limit_is_higher():
    plan = line_plan(before=doublings(20), limits=Limits(memory_bytes=256 * MIB))  # 32 MiB and less before
    assert train(Trainer(plan)).steps == 1
    with pytest.raises(MemoryLimitExceeded, match="the 16 MiB"):
        train(Trainer(plan, memory_bytes=16 * MIB))


def test_a_device_cannot_raise_the_plans_limit():
    plan = line_plan(before=doublings(24), limits=Limits(memory_bytes=16 * MIB))
    with pytest.raises(MemoryLimitExceeded, match="the 16 MiB"):
        train(Trainer(plan, memory_bytes=1024 * MIB))


def test_trainers_of_one_process_have_limits_of_their_own():
    plan = line_plan(before=doublings(20))
    small, large = (Trainer(plan, memory_bytes=memory * MIB) for memory in (8, 128))
    for _ in range(2):
        assert train(large).steps == 1
        with pytest.raises(MemoryLimitExceeded):
            train(small)


def test_a_smaller_batch_fits_after_one_that_did_not():
    # 2^16 copies: 2 MiB for 4 rows, 512 MiB for 1024.
    trainer = Trainer(line_plan(before=doublings(16), limits=Limits(memory_bytes=16 * MIB)))
    many = Dataset((np.ones((1024, 2), np.float32),), np.zeros(1024, np.int64))
    with pytest.raises(MemoryLimitExceeded):
        trainer.run_epochs(BASE, many, Training(batch_size=1024), np.random.default_rng(1))
    assert train(trainer).steps == 1


def test_the_memory_of_a_trainer_goes_with_it():
    trainer = Trainer(line_plan(before=doublings(21)))  # 64 MiB from 32
    train(trainer)
    held = resident_mib()
    del trainer
    assert held - resident_mib() > 60


def test_constants_that_grow_without_bound_are_not_computed_when_opening():
    # From a constant of 2^12 elements: 2^27 of them, 512 MiB, by constant folding alone.
    plan = line_plan(
        before=[*doublings(15, "seed")[:-1], node("Slice d13 rows one_row rows -> s"), node("Add x0 s -> x")],
        constants=[constant("seed", np.zeros((1 << 11, 2))), constant("one_row", [1], np.int64)],
        limits=Limits(memory_bytes=32 * MIB),
    )
    before = resident_mib()
    trainer = Trainer(plan)
    assert resident_mib() - before < 40
    with pytest.raises(MemoryLimitExceeded, match="the 32 MiB"):
        train(trainer)


def test_evaluation_has_the_same_limits():
    plan = line_plan(before_evaluation=doublings(24), limits=Limits(memory_bytes=64 * MIB))
    with pytest.raises(MemoryLimitExceeded, match="the 64 MiB"):
        Evaluator(plan).evaluate(BASE, EXAMPLES)
    with pytest.raises(MemoryLimitExceeded, match="the 8 MiB"):
        Evaluator(plan, memory_bytes=8 * MIB).predict(BASE, EXAMPLES.inputs)


def test_a_step_of_many_operators_ends_soon_after_its_deadline():
    # 400 products of 2 * 300^3 operations take a second or more, each one a few milliseconds.
    plan = line_plan(**products(400, 300), limits=Limits(step_deadline_s=0.02))
    gave_up = []
    trainer = Trainer(plan, give_up=gave_up.append)
    with pytest.raises(StepDeadlineExceeded, match=r"longer than 0\.02 s; smaller batches"):
        train(trainer)
    assert not gave_up


def test_one_operator_that_does_not_end_is_given_up():
    # A product of 2 * 4500^3 operations takes two seconds or more, and is not interrupted; what comes before
    # it is over well before the deadline, on a busy machine too.
    plan = line_plan(**products(1, 4500), limits=Limits(step_deadline_s=0.25))
    told, gave_up = threading.Event(), []

    def give_up(reason):
        gave_up.append(reason)
        told.set()

    with pytest.raises(StepDeadlineExceeded):
        train(Trainer(plan, give_up=give_up))
    assert told.is_set()
    assert "did not stop 4 deadlines after the one of 0.25 s" in gave_up[0]


def test_an_opening_that_takes_too_long_is_stopped(monkeypatch):
    # 100 products of constants, each of 244 KiB: within the memory, not within the time.
    monkeypatch.setattr(plan_session, "SHORTEST_OPENING_DEADLINE_S", 0.02)
    chain = [
        node("ConstantOfShape shape -> c"),
        node("Expand one_row c_shape -> m0"),
        *(node(f"MatMul m{index} m0 -> m{index + 1}") for index in range(100)),
        node("ReduceSum m100 -> total", keepdims=0),
        node("Add x0 total -> x"),
    ]
    constants = [
        constant("shape", [1], np.int64),
        constant("c_shape", [250, 250], np.int64),
        constant("one_row", np.full((1, 250), 1e-3)),
    ]
    plan = line_plan(before=chain, constants=constants, limits=Limits(step_deadline_s=0.02))
    with pytest.raises(PlanRefused, match=r"opening the plan takes longer than 0\.02 s"):
        Trainer(plan)


STUCK = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import numpy as np
from test_plan_limits import BASE, EXAMPLES, TRAINING, Limits, line_plan, products
from edge_agent.plan_runtime import Trainer
from fedtide.assembly import end_process
plan = line_plan(**products(1, 4500), limits=Limits(step_deadline_s=0.25))
give_up = lambda reason: end_process(Path({note!r}), plan.id, reason)
Trainer(plan, give_up=give_up).run_epochs(BASE, EXAMPLES, TRAINING, np.random.default_rng(1))
"""


def test_an_agent_ends_itself_when_a_plan_does_not_stop_and_leaves_it_alone_then(tmp_path):
    from edge_agent.plan_trial import PlanTrial  # noqa: PLC0415 - beside what it is for

    note = tmp_path / "plan-trial"
    script = STUCK.format(folder=str(Path(__file__).parent), note=str(note))
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, text=True, timeout=60
    )
    assert ended.returncode == 70, ended.stderr
    assert "one operator of it takes too long for this device; the agent ends itself" in ended.stderr
    plan = line_plan(**products(1, 4500), limits=Limits(step_deadline_s=0.25))
    with pytest.raises(PlanRefused, match="takes too long for this device; the plan is not tried again"):
        PlanTrial(note).check(plan.id)
    PlanTrial(note).check(line_plan().id)


def test_an_agent_ends_itself_even_if_the_disk_does_not_take_the_note(tmp_path):
    note = tmp_path / "no such directory" / "plan-trial"
    call = f"end_process(Path({str(note)!r}), PlanId('aa'), 'it does not stop')"
    script = f"from fedtide.assembly import *; {call}"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, text=True, timeout=60
    )
    assert ended.returncode == 70, ended.stderr
    assert "it does not stop; the agent ends itself" in ended.stderr
