"""What ``Training`` asks for, on a plan small enough to compute by hand; see ``hand_made``."""

import msgspec
import numpy as np
import pytest
from hand_made import line_plan

from edge_agent.class_weights import class_weights
from edge_agent.dataset import Dataset
from edge_agent.kept_state import NOTHING_KEPT, Kept, with_own_statistics
from edge_agent.plan_runtime import Evaluator, Trainer
from fedtide.wire.ids import ModelVersion
from fedtide.wire.training import StepDecay, Training

BASE = np.array([1, 2, 0, 0], np.float32)  # p.w = [1, 2], b.mean = [0, 0]
ROWS = np.array([[1, 0], [3, 2]] * 2, np.float32)  # mean [2, 1]
EXAMPLES = Dataset((ROWS,), np.array([0, 0, 0, 2]))
ONE_BATCH = Training(batch_size=4, learning_rate=0.1)


def train(plan, training, dataset=EXAMPLES, base=BASE, **more):
    return Trainer(plan).run_epochs(base, dataset, training, np.random.default_rng(1), **more)


def changed(training=ONE_BATCH, **fields):
    return msgspec.structs.replace(training, **fields)


class Clock:
    """Monotonic seconds that go on by as much at every look."""

    def __init__(self, tick_s):
        self.now = 100.0
        self.tick_s = tick_s

    def __call__(self):
        self.now += self.tick_s
        return self.now


def test_the_learning_rate_follows_the_version():
    # 0.1 at version 0, a tenth of it at version 5: w = [1, 2] - 0.01 * [2, 1].
    training = changed(schedule=StepDecay(every_versions=5, by=0.1))
    first = train(line_plan(), training)
    later = train(line_plan(), training, version=ModelVersion(5))
    np.testing.assert_allclose(first.parameters[:2], [0.8, 1.9], rtol=1e-6)
    np.testing.assert_allclose(later.parameters[:2], [0.98, 1.99], rtol=1e-6)


def test_no_step_is_begun_once_the_time_is_used():
    # A look at the clock before each step: 1 s, 2 s, 3 s after the beginning; the third step is not begun.
    training = changed(batch_size=1, max_seconds=3.0)
    result = train(line_plan(), training, clock=Clock(1.0))
    assert (result.steps, result.num_examples) == (2, 2)


def test_one_step_is_taken_however_little_time_there_is():
    training = changed(batch_size=1, max_seconds=0.5)
    result = train(line_plan(), training, clock=Clock(1000.0))
    assert (result.steps, result.num_examples) == (1, 1)


def test_an_example_trained_on_in_two_epochs_counts_once():
    # Epochs of two batches; three steps see each of the four examples at least once and two of them twice.
    result = train(line_plan(), changed(batch_size=2, local_epochs=2, max_steps=3))
    assert (result.steps, result.num_examples) == (3, 4)


def test_examples_that_only_a_later_epoch_reached_count():
    # Five examples in twos, the last one left out of each epoch: over 20 epochs, every one had its turn.
    plan = line_plan()
    pairs = msgspec.structs.replace(plan.manifest, min_batch=2)
    five = Dataset((np.ones((5, 2), np.float32),), np.zeros(5, np.int64))
    plan = type(plan)(pairs, plan.train, plan.evaluation)
    assert train(plan, changed(batch_size=2), five).num_examples == 4
    assert train(plan, changed(batch_size=2, local_epochs=20), five).num_examples == 5


def test_kept_optimizer_state_goes_on_where_the_last_update_ended():
    # g = [2, 1] each time. First m = g; kept, then m = g / 2 + g = [3, 1.5].
    keep = changed(optimizer_state="keep")
    first = train(line_plan(), keep)
    np.testing.assert_array_equal(first.kept.optimizer[0], [2, 1])
    second = train(line_plan(), keep, kept=first.kept)
    np.testing.assert_allclose(second.parameters[:2], [1 - 0.3, 2 - 0.15], rtol=1e-6)
    np.testing.assert_array_equal(first.kept.optimizer[0], [2, 1])  # a value, not the trainer's memory


def test_state_that_is_to_be_reset_is_neither_used_nor_kept():
    kept = Kept(optimizer=(np.array([100, 100], np.float32),))
    result = train(line_plan(), ONE_BATCH, kept=kept)
    np.testing.assert_allclose(result.parameters[:2], [0.8, 1.9], rtol=1e-6)
    assert not result.kept


def test_devices_that_share_a_trainer_do_not_share_its_state():
    trainer, keep = Trainer(line_plan(local=True)), changed(optimizer_state="keep")
    results = [trainer.run_epochs(BASE, EXAMPLES, keep, np.random.default_rng(1)) for _ in range(2)]
    assert results[0].parameters.tolist() == results[1].parameters.tolist()
    assert results[0].kept.counters[0] == results[1].kept.counters[0] == 1


def test_averaged_statistics_are_part_of_the_update():
    # b.mean' = [0, 0] / 2 + [2, 1] / 2.
    result = train(line_plan(), ONE_BATCH)
    np.testing.assert_array_equal(result.parameters[2:], [1, 0.5])
    assert result.kept == NOTHING_KEPT


def test_local_statistics_stay_on_the_device():
    base = np.array([1, 2, 7, 7], np.float32)
    plan = line_plan(local=True)
    first = train(plan, ONE_BATCH, base=base)
    np.testing.assert_array_equal(first.parameters[2:], [7, 7])  # the delta is zero
    np.testing.assert_array_equal(first.kept.statistics[0], [4.5, 4])  # [7, 7] / 2 + [2, 1] / 2
    second = train(plan, ONE_BATCH, base=base, kept=first.kept)
    np.testing.assert_array_equal(second.kept.statistics[0], [3.25, 2.5])
    np.testing.assert_array_equal(second.parameters[2:], [7, 7])
    assert [int(result.kept.counters[0]) for result in (first, second)] == [1, 2]


def test_evaluation_can_use_the_devices_own_statistics():
    # out = x * w + mean: the means of x * w are 2 and 2; the own statistics [1, 3] add 2.
    plan = line_plan(local=True)
    kept = Kept(statistics=(np.array([1, 3], np.float32),))
    own = with_own_statistics(plan.manifest, BASE, kept)
    evaluator = Evaluator(plan)
    assert evaluator.evaluate(BASE, EXAMPLES).loss == pytest.approx(2)
    assert evaluator.evaluate(own, EXAMPLES).loss == pytest.approx(4)
    np.testing.assert_array_equal(BASE[2:], 0)


def test_the_proximal_term_pulls_towards_the_base():
    # Step 1 starts at the base: no pull, m = [2, 1], w = base - 0.1 m. Step 2: g = [2, 1] + 0.5 * (w - base)
    # = [1.9, 0.95], m = [1, 0.5] + g = [2.9, 1.45], w = [0.8, 1.9] - 0.1 m = [0.51, 1.755].
    result = train(line_plan(proximal=True), changed(local_epochs=2, proximal=0.5))
    np.testing.assert_allclose(result.parameters[:2], [0.51, 1.755], rtol=1e-6)


def test_without_a_pull_the_proximal_plan_trains_as_any_other():
    training = changed(local_epochs=3)
    plain, proximal = (train(plan, training) for plan in (line_plan(), line_plan(proximal=True)))
    np.testing.assert_array_equal(plain.parameters, proximal.parameters)


def test_a_plan_without_a_proximal_term_cannot_pull():
    with pytest.raises(ValueError, match=r"proximal is 0\.5, and plan 'line' was built without"):
        train(line_plan(), changed(proximal=0.5))


def test_balanced_class_weights_reach_the_step():
    # Labels 0, 0, 0, 2 of three classes: weights 4/9, 1, 4/3; their mean over the rows is (3 * 4/9 + 4/3) / 4
    # = 2/3, so w = base - 0.1 * [2, 1] * 2/3.
    result = train(line_plan(class_weights=True), changed(class_weights="balanced"))
    np.testing.assert_allclose(result.parameters[:2], [1 - 0.4 / 3, 2 - 0.2 / 3], rtol=1e-6)


def test_equal_class_weights_change_nothing():
    plain, weighted = (train(plan, ONE_BATCH) for plan in (line_plan(), line_plan(class_weights=True)))
    np.testing.assert_array_equal(plain.parameters, weighted.parameters)


def test_a_plan_without_class_weights_cannot_balance():
    with pytest.raises(ValueError, match="class_weights is 'balanced', and plan 'line' was built without"):
        train(line_plan(), changed(class_weights="balanced"))


def test_absent_classes_and_labels_out_of_range_have_no_part_in_balancing():
    # Of 0, 1, 1, 1 and -100, 7, four labels count: 4 / (3 * 1), 4 / (3 * 3), and 1 for the absent class.
    weights = class_weights("balanced", 3, np.array([0, 1, 1, 1, -100, 7]))
    np.testing.assert_allclose(weights, [4 / 3, 4 / 9, 1], rtol=1e-6)
    assert weights.dtype == np.float32


def test_labels_of_pixels_are_balanced_over_all_of_them():
    # Two images of two pixels: labels 0, 0, 0, 1. 4 / (2 * 3) and 4 / (2 * 1).
    np.testing.assert_allclose(class_weights("balanced", 2, np.array([[0, 0], [0, 1]])), [2 / 3, 2])


def test_targets_that_are_no_labels_cannot_be_balanced():
    with pytest.raises(ValueError, match="class labels as targets, not float32"):
        class_weights("balanced", 2, np.zeros(3, np.float32))
