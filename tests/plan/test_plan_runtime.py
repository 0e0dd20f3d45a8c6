import math

import msgspec
import numpy as np
import pytest

from edge_agent.dataset import Dataset
from edge_agent.plan_guard import PlanRefused
from edge_agent.plan_runtime import Evaluator, StepDeadlineExceeded, StepFailed, Trainer
from fedtide.wire.plan import Limits, Plan
from fedtide.wire.training import Training

ONE_EPOCH = Training(local_epochs=1, batch_size=32, learning_rate=0.1)


def generator():
    return np.random.default_rng(7)


@pytest.fixture(scope="module")
def trainer(mlp):
    return Trainer(mlp.plan)


@pytest.fixture(scope="module")
def cnn_trainer(cnn):
    return Trainer(cnn.plan, seed=1)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_training_makes_the_loss_fall(name, request, points, images):
    built, dataset = request.getfixturevalue(name), points if name == "mlp" else images
    training = Training(local_epochs=15, batch_size=16, learning_rate=0.3 if name == "mlp" else 0.01)
    evaluator = Evaluator(built.plan)
    before = evaluator.evaluate(built.initial, dataset)
    result = Trainer(built.plan, seed=0).run_epochs(built.initial, dataset, training, generator())
    after = evaluator.evaluate(result.parameters, dataset)
    assert after.loss < 0.5 * before.loss
    assert after.metric > 0.9
    assert after.num_examples == len(dataset)


def test_the_given_parameters_are_never_overwritten(trainer, mlp, points):
    given = mlp.initial.copy()
    first = trainer.run_epochs(given, points, ONE_EPOCH, generator())
    kept = first.parameters.copy()
    trainer.run_epochs(first.parameters, points, ONE_EPOCH, generator())
    np.testing.assert_array_equal(given, mlp.initial)
    np.testing.assert_array_equal(first.parameters, kept)
    assert not np.array_equal(kept, given)


def test_the_last_smaller_batch_is_trained_on(trainer, mlp, points):
    # 70 examples in batches of 32: 32 + 32 + 6.
    result = trainer.run_epochs(
        mlp.initial, points, msgspec.structs.replace(ONE_EPOCH, local_epochs=2), generator()
    )
    assert (result.steps, result.num_examples) == (6, 70)


def test_a_last_batch_below_the_smallest_is_left_out(cnn_trainer, cnn, images):
    # 65 = 32 + 32 + 1, and batch normalisation needs two.
    result = cnn_trainer.run_epochs(cnn.initial, images, ONE_EPOCH, generator())
    assert (result.steps, result.num_examples) == (2, 64)


def test_the_loss_is_the_mean_by_examples_of_the_last_epoch(trainer, mlp, points):
    # At a learning rate of zero every batch sees the same parameters, so the mean is the evaluation's.
    still = msgspec.structs.replace(ONE_EPOCH, learning_rate=0.0)
    result = trainer.run_epochs(mlp.initial, points, still, generator())
    evaluation = Evaluator(mlp.plan).evaluate(mlp.initial, points)
    assert result.loss == pytest.approx(evaluation.loss, rel=1e-5)
    assert result.metric == pytest.approx(evaluation.metric, rel=1e-5)
    np.testing.assert_array_equal(result.parameters, mlp.initial)


def test_max_steps_ends_training(trainer, mlp, points):
    limited = msgspec.structs.replace(ONE_EPOCH, local_epochs=5, max_steps=4)
    result = trainer.run_epochs(mlp.initial, points, limited, generator())
    assert (result.steps, result.num_examples) == (4, 70)  # 32 + 32 + 6 + 32 passes, of 70 distinct examples


def test_stopping_keeps_the_steps_so_far(trainer, mlp, points):
    answers = iter([False, True])
    stopped = trainer.run_epochs(mlp.initial, points, ONE_EPOCH, generator(), lambda: next(answers))
    one_step = msgspec.structs.replace(ONE_EPOCH, max_steps=1)
    limited = trainer.run_epochs(mlp.initial, points, one_step, generator())
    assert (stopped.steps, stopped.num_examples) == (1, 32)
    np.testing.assert_array_equal(stopped.parameters, limited.parameters)


def test_stopping_before_the_first_step_trains_nothing(trainer, mlp, points):
    result = trainer.run_epochs(mlp.initial, points, ONE_EPOCH, generator(), lambda: True)
    assert (result.steps, result.num_examples) == (0, 0)
    assert math.isnan(result.loss)
    np.testing.assert_array_equal(result.parameters, mlp.initial)


def test_optimizer_state_starts_at_zero_each_time(cnn, images):
    # Same seed, same order, one trainer used before and one fresh: any state kept would show.
    few = Training(batch_size=32, learning_rate=0.01, max_steps=1)
    used, fresh = Trainer(cnn.plan, seed=3), Trainer(cnn.plan, seed=3)
    first = used.run_epochs(cnn.initial, images, few, generator())
    expected = fresh.run_epochs(cnn.initial, images, few, generator())
    np.testing.assert_array_equal(first.parameters, expected.parameters)
    # The masks differ from here on; a parameter behind no dropout moves by one AdamW step of at most
    # learning_rate * (1 + weight decay * |p|), which it could not with a moment left over and step 2.
    again = used.run_epochs(cnn.initial, images, few, generator())
    bias = {t.name: place for t, place in cnn.plan.manifest.schema.slices()}["p.6.bias"]
    moved = np.abs(again.parameters[bias] - cnn.initial[bias] * (1 - 0.01 * 0.01))
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_dropout_draws_a_new_mask_each_step(cnn, images):
    trainer = Trainer(cnn.plan, seed=3)
    still = Training(batch_size=32, learning_rate=0.0, max_steps=1)
    losses = {trainer.run_epochs(cnn.initial, images, still, generator()).loss for _ in range(3)}
    assert len(losses) == 3


def test_batch_statistics_move_and_are_part_of_the_parameters(cnn_trainer, cnn, images):
    result = cnn_trainer.run_epochs(cnn.initial, images, ONE_EPOCH, generator())
    before = cnn.plan.manifest.schema.split(cnn.initial)
    after = cnn.plan.manifest.schema.split(result.parameters)
    assert (before["b.1.running_var"] == 1).all()
    assert (after["b.1.running_var"] != 1).all()


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (Dataset((np.zeros((4, 8)),), np.zeros(4, np.int64)), "x0 is float64 of shape"),
        (Dataset((np.zeros((4, 9), np.float32),), np.zeros(4, np.int64)), "needs float32 of shape"),
        (Dataset((np.zeros((4, 8), np.float32),), np.zeros(4, np.int32)), "y is int32"),
        (Dataset((np.zeros((4, 8), np.float32),)), "has no targets"),
        (Dataset((np.zeros((4, 8), np.float32),) * 2, np.zeros(4, np.int64)), "3 arrays, the plan takes 2"),
        (Dataset((np.zeros((0, 8), np.float32),), np.zeros(0, np.int64)), "0 examples in batches of 32"),
    ],
)
def test_a_dataset_that_does_not_fit_is_named(trainer, mlp, dataset, reason):
    with pytest.raises(ValueError, match=reason):
        trainer.run_epochs(mlp.initial, dataset, ONE_EPOCH, generator())


def test_arrays_of_different_lengths_are_no_dataset():
    with pytest.raises(ValueError, match=r"one length, not \[3, 4\]"):
        Dataset((np.zeros((3, 8)),), np.zeros(4))


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros(195, np.float64)])
def test_parameters_that_do_not_fit_are_named(trainer, mlp, points, wrong):
    with pytest.raises(ValueError, match=r"the plan needs float32 of shape \(195,\)"):
        trainer.run_epochs(wrong, points, ONE_EPOCH, generator())
    with pytest.raises(ValueError, match=r"the plan needs float32 of shape \(195,\)"):
        Evaluator(mlp.plan).evaluate(wrong, points)


def test_a_label_out_of_range_stops_the_step(trainer, mlp, points):
    wrong = Dataset(points.inputs, np.full(70, 3))
    with pytest.raises(StepFailed, match="onnxruntime stopped"):
        trainer.run_epochs(mlp.initial, wrong, ONE_EPOCH, generator())
    with pytest.raises(StepFailed, match="onnxruntime stopped"):
        Evaluator(mlp.plan).evaluate(mlp.initial, wrong)


def test_a_step_beyond_its_deadline_is_stopped(mlp):
    # A batch of 200,000 examples takes tens of milliseconds, the deadline is a tenth of one.
    hurried = msgspec.structs.replace(mlp.plan.manifest, limits=Limits(step_deadline_s=1e-4))
    trainer = Trainer(Plan(hurried, mlp.plan.train, mlp.plan.evaluation))
    dataset = Dataset((np.zeros((200_000, 8), np.float32),), np.zeros(200_000, np.int64))
    training = Training(batch_size=200_000, local_epochs=20)
    with pytest.raises(StepDeadlineExceeded, match=r"longer than 0\.0001 s"):
        trainer.run_epochs(mlp.initial, dataset, training, generator())


def test_a_manifest_of_another_shape_is_refused(mlp):
    manifest = mlp.plan.manifest
    wider = msgspec.structs.replace(manifest.inputs[0], shape=(None, 9))
    plan = Plan(msgspec.structs.replace(manifest, inputs=(wider,)), mlp.plan.train, mlp.plan.evaluation)
    with pytest.raises(PlanRefused, match="input x0 of the train graph"):
        Trainer(plan)
    with pytest.raises(PlanRefused, match="input x0 of the evaluation graph"):
        Evaluator(plan).predict(mlp.initial, (np.zeros((1, 9), np.float32),))


def test_a_manifest_without_a_state_tensor_is_refused(autoencoder):
    manifest = autoencoder.plan.manifest
    fewer = msgspec.structs.replace(manifest, local_state=manifest.local_state[1:])
    with pytest.raises(PlanRefused, match="differ by"):
        Trainer(Plan(fewer, autoencoder.plan.train, autoencoder.plan.evaluation))


def test_evaluation_does_not_depend_on_the_batch_size(cnn, images):
    evaluator = Evaluator(cnn.plan)
    whole, parts = (evaluator.evaluate(cnn.initial, images, batch_size=size) for size in (65, 7))
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    assert whole.metric == pytest.approx(parts.metric, rel=1e-5)


def test_predictions_give_the_metric(cnn, images):
    evaluator = Evaluator(cnn.plan)
    output = evaluator.predict(cnn.initial, images.inputs)
    assert output.shape == (65, 3)
    assert (output.argmax(1) == images.targets).mean() == pytest.approx(
        evaluator.evaluate(cnn.initial, images).metric, rel=1e-5
    )


def test_an_autoencoder_predicts_without_targets(autoencoder, points):
    evaluator = Evaluator(autoencoder.plan)
    output = evaluator.predict(autoencoder.initial, points.inputs)
    evaluation = evaluator.evaluate(autoencoder.initial, Dataset(points.inputs))
    assert evaluation.loss == pytest.approx(float(((output - points.inputs[0]) ** 2).mean()), rel=1e-5)
    assert evaluation.metric is None


def test_parameters_changed_in_place_are_noticed(mlp, points):
    evaluator, parameters = Evaluator(mlp.plan), mlp.initial.copy()
    before = evaluator.predict(parameters, points.inputs)
    parameters[-3:] += 1.0  # the biases of the output
    np.testing.assert_allclose(evaluator.predict(parameters, points.inputs), before + 1.0, atol=1e-5)


def test_an_empty_dataset_is_not_evaluated(mlp):
    with pytest.raises(ValueError, match="no examples"):
        Evaluator(mlp.plan).evaluate(
            mlp.initial, Dataset((np.zeros((0, 8), np.float32),), np.zeros(0, np.int64))
        )
