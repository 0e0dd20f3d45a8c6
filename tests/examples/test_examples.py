"""The examples of docs/examples: each builds into a plan, and a fleet of two devices learns with it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.plan.build import build
from coordinator.plan.task import load_task
from edge_agent.dataset import Dataset
from edge_agent.plan_evaluation import Evaluator
from edge_agent.plan_runtime import Trainer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"
TEXT = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())


def load_example(name):
    """The example's module, as `python docs/examples/NAME.py` has it."""
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    torch.set_num_threads(1)


def read(path):
    with np.load(path, allow_pickle=False) as archive:
        return Dataset((archive["x"],), archive.get("y"))


def averaged(built, devices, times):
    """Parameters after so often: every device trains as its plan says, and their mean is the next version."""
    trainer = Trainer(built.plan, seed=0)
    rng = np.random.default_rng(0)
    training = built.plan.manifest.training
    parameters = built.initial
    for _ in range(times):
        trained = [trainer.run_epochs(parameters, device, training, rng) for device in devices]
        parameters = np.mean([result.parameters for result in trained], axis=0, dtype=np.float32)
    return parameters


# Dealing examples out


def test_digits_go_to_one_device_each_and_a_fifth_is_held_out(tmp_path):
    load_example("digits_cnn").deal(tmp_path, 3)

    files = {file.stem: read(file) for file in tmp_path.iterdir()}

    assert set(files) == {"device-1", "device-2", "device-3", "held-out"}
    assert len(files["held-out"]) == 1797 // 5
    assert sum(len(dataset) for dataset in files.values()) == 1797
    assert files["device-1"].inputs[0].shape[1:] == (1, 8, 8)
    assert {dataset.inputs[0].dtype for dataset in files.values()} == {np.dtype(np.float32)}


def test_activity_windows_are_dealt_by_person_and_unseen_persons_are_held_out(tmp_path):
    persons = np.array([1, 1, 2, 3, 3, 3], np.uint8)
    x = np.arange(6 * 9 * 128).reshape(6, 9, 128).astype(np.float16)
    y = np.arange(6, dtype=np.uint8)
    np.savez(tmp_path / "all.npz", x=x, y=y, subject=persons, test_subjects=np.array([2], np.uint8))

    load_example("activity").deal(tmp_path / "dealt", tmp_path / "all.npz")

    labels = {file.stem: read(file).targets.tolist() for file in (tmp_path / "dealt").iterdir()}
    assert labels == {"person-01": [0, 1], "person-03": [3, 4, 5], "held-out": [2]}


def test_a_pump_run_is_in_deviations_of_its_own_healthy_start():
    pump = load_example("pump")
    readings = np.random.default_rng(0).normal(5.0, 2.0, (600, 8))
    anomaly = np.zeros(600)
    anomaly[300:] = 1

    run = pump.standardised(readings, anomaly)

    assert run.healthy == 300  # where the anomaly begins, before the 400 readings
    np.testing.assert_allclose(run.readings[:300].mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(run.readings[:300].std(0), 1.0, atol=1e-5)
    assert run.windows.shape == (300 - 15, 8, 16)
    np.testing.assert_array_equal(run.windows[7], run.readings[7:23].T)


def test_a_pump_channel_that_stands_still_is_zero_and_an_outlier_is_cut():
    pump = load_example("pump")
    readings = np.full((20, 8), 7.0)
    readings[-1] = 8.0  # beyond the ten deviations of 7 * 1e-3 + 1e-6

    run = pump.standardised(readings, np.array([0] * 19 + [1]))

    assert run.readings[:19].tolist() == [[0.0] * 8] * 19
    assert run.readings[19].tolist() == [10.0] * 8


def test_the_score_of_a_model_that_cannot_rebuild_unusual_readings_is_one():
    pump = load_example("pump")
    readings = np.ones((60, 8), np.float32)
    readings[40:] = 3.0
    run = pump.PumpRun(readings, (np.arange(60) >= 40).astype(int), healthy=20)

    # Rebuilt as ones, every window from reading 40 on has an error, and no window before it.
    assert pump.roc_auc([run], np.ones_like) == 1.0
    # Without an error anywhere all scores are alike: chance.
    assert pump.roc_auc([run], lambda given: given) == 0.5


def test_characters_are_read_as_contexts_and_what_comes_next():
    characters = load_example("characters")

    x, y = characters.examples("abcde€g", context=2, step=2)

    place = characters.ALPHABET.index
    assert x.tolist() == [[place("a"), place("b")], [place("c"), place("d")], [place("e"), place(" ")]]
    assert y.tolist() == [place("c"), place("e"), place("g")]


def test_a_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"3 characters; it must be longer than the context, 32"):
        load_example("characters").examples("abc")


# Learning


def test_digits_are_learnt_by_two_devices_that_see_different_digits(tmp_path):
    load_example("digits_cnn").deal(tmp_path, 2)
    built = build(load_task(EXAMPLES / "digits_cnn.py"))
    devices = [read(tmp_path / f"device-{number}.npz") for number in (1, 2)]
    held_out = read(tmp_path / "held-out.npz")
    evaluator = Evaluator(built.plan)

    before = evaluator.evaluate(built.initial, held_out)
    after = evaluator.evaluate(averaged(built, devices, times=5), held_out)

    assert before.metric < 0.25
    assert after.metric > 0.9


def test_activities_of_a_third_person_are_learnt_from_two(tmp_path):
    load_example("activity").deal(tmp_path, None)
    built = build(load_task(EXAMPLES / "activity.py"))
    devices = [read(tmp_path / f"person-0{number}.npz") for number in (1, 2)]
    held_out = read(tmp_path / "held-out.npz")
    evaluator = Evaluator(built.plan)

    before = evaluator.evaluate(built.initial, held_out)
    after = evaluator.evaluate(averaged(built, devices, times=5), held_out)

    assert before.metric < 0.3
    assert after.metric > 0.9


def test_a_pumps_anomalies_stand_out_after_training_on_healthy_pumps_only():
    pump = load_example("pump")
    built = build(load_task(EXAMPLES / "pump.py"))
    *devices, other = pump.made_up_runs(3, np.random.default_rng(1))
    healthy = Dataset((other.windows,))
    evaluator = Evaluator(built.plan)

    def auc(parameters):
        return pump.roc_auc([other], lambda given: evaluator.predict(parameters, (given,)))

    after = averaged(built, [Dataset((run.windows,)) for run in devices], times=6)

    assert evaluator.evaluate(after, healthy).loss < 0.7 * evaluator.evaluate(built.initial, healthy).loss
    assert auc(after) > 0.9
    assert auc(after) > auc(built.initial) + 0.1


@pytest.mark.long
def test_the_next_character_is_guessed_better_after_training_on_two_texts():
    characters = load_example("characters")
    built = build(characters.characters_task(context=12, hidden=24))
    parts = [TEXT[:4500], TEXT[4500:9000], TEXT[9000:]]
    *devices, held_out = (
        Dataset((x,), y) for x, y in (characters.examples(part, context=12) for part in parts)
    )
    evaluator = Evaluator(built.plan)

    before = evaluator.evaluate(built.initial, held_out)
    after = evaluator.evaluate(averaged(built, devices, times=4), held_out)

    assert before.loss == pytest.approx(np.log(64), rel=0.05)  # no character is likelier than another
    assert after.loss < before.loss - 0.9
