"""The demo: what it deals out, what it counts, and one short run over the broker that comes as a wheel."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from broker_config.local import available_brokers
from coordinator.status import EvaluationPoint
from fedtide.cli import command
from fedtide.demo.digits import dirichlet_parts, split_digits
from fedtide.demo.report import StalenessSummary, seconds_to_target, summarise_staleness
from fedtide.demo.settings import DemoSettings, kind_of


def test_every_example_goes_to_exactly_one_device():
    labels = np.repeat(np.arange(10), 30)

    parts = dirichlet_parts(labels, 7, 0.3, np.random.default_rng(0))

    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    assert min(len(part) for part in parts) >= 8


def test_a_small_alpha_gives_devices_few_labels():
    labels = np.repeat(np.arange(10), 100)

    def labels_per_device(alpha):
        parts = dirichlet_parts(labels, 10, alpha, np.random.default_rng(0))
        return np.mean([len(np.unique(labels[part])) for part in parts])

    assert labels_per_device(0.1) < labels_per_device(100.0) - 3


def test_a_fifth_of_the_digits_is_held_out_and_shared_with_no_device():
    digits = split_digits(20, 0.3, np.random.default_rng(0))

    assert len(digits.held_out) == 359  # 0.2 · 1797
    assert sum(len(part) for part in digits.devices) == 1797 - 359
    assert digits.held_out.inputs[0].dtype == np.float32
    assert digits.held_out.inputs[0].max() == 1.0


def test_staleness_is_summarised_from_its_histogram():
    # 0,0,0,0,0,0,0,0,0,0 (10), 1×9, 20: mean (9 + 20) / 20; the 10th of 20 is 0, the 19th is 1.
    assert summarise_staleness({0: 10, 1: 9, 20: 1}) == StalenessSummary(mean=29 / 20, p50=0, p95=1, max=20)


def test_without_updates_there_is_no_staleness():
    assert summarise_staleness({}) == StalenessSummary(mean=0.0, p50=0, p95=0, max=0)


def test_the_target_is_reached_when_an_evaluation_first_says_so():
    points = tuple(
        EvaluationPoint(version=version, seconds=float(version), updates=0, loss=0.0, metric=metric)
        for version, metric in enumerate([0.5, 0.96, 0.94, 0.97])
    )

    assert seconds_to_target(points, 0.95) == 1.0
    assert seconds_to_target(points, 0.99) is None


def test_the_first_devices_are_slow_and_the_next_ones_drop_off(tmp_path):
    settings = DemoSettings(
        devices=20, slow=4, dropping=2, seed=0, alpha=0.3, target=0.95, seconds=60.0, codec="q8",
        out=tmp_path, broker=None,
    )  # fmt: skip

    kinds = [kind_of(number, settings) for number in range(20)]

    assert kinds == ["slow"] * 4 + ["dropping"] * 2 + ["fast"] * 14


@pytest.mark.skipif("nats" not in available_brokers(), reason="pip install 'fedtide[broker]'")
def test_a_short_demo_counts_everything_it_reports(tmp_path):
    asked = "demo --devices 8 --slow 1 --dropping 1 --seconds 14 --target 0.5 --broker nats --json"
    arguments = [*asked.split(), "--out", str(tmp_path)]

    shown = CliRunner().invoke(command, arguments)

    assert shown.exit_code == 0, shown.output
    report = json.loads((tmp_path / "report.json").read_text())
    updates = report["updates"]
    assert (report["broker"], report["mqtt_version"], report["seed"]) == ("nats", "3.1.1", 0)
    assert report["accuracy"] >= 0.5
    assert 0 < report["seconds_to_target"] <= report["seconds"]
    judged = updates["applied"] + updates["duplicate"] + sum(updates["rejected"].values())
    assert updates["received"] == judged + updates["waiting"]
    assert updates["sent"] >= updates["applied"] == sum(device["applied"] for device in report["devices"])
    assert updates["applied"] == sum(report["staleness_histogram"].values())
    assert sum(device["weight_share"] for device in report["devices"]) == pytest.approx(1.0)
    assert report["uplink_bytes"] < report["uplink_bytes_float32"] / 3
    assert all(device["applied"] >= 1 for device in report["devices"])
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
