"""The Prometheus endpoint, scraped over HTTP, and the operator's view of the same status."""

import io
import urllib.request

import msgspec
import pytest
from rich.console import Console

from broker_config.local import free_port
from coordinator.metrics import serve_metrics
from coordinator.settings import Metrics
from coordinator.status import (
    DeviceEvaluation,
    DeviceStatus,
    DeviceTrouble,
    EvaluationPoint,
    FederatedMetric,
    RolledBack,
    Status,
    StatusFile,
    Updates,
    read,
)
from fedtide.status_view import fleet_view
from fedtide.wire.clock import SYSTEM_CLOCK


def device(name, *, online, applied, share):
    return DeviceStatus(
        device=name, online=online, model_version=6, applied=applied, rejected=1, mean_staleness=1.5,
        weight_share=share, last_rejection="too-stale", loss=0.25,
    )  # fmt: skip


def federated(version, metric, oldest=None):
    return FederatedMetric(
        oldest_version=version if oldest is None else oldest, version=version, devices=2, examples=1300,
        loss=0.75, metric=metric,
    )  # fmt: skip


def evaluation(version, metric, loss=0.5):
    return EvaluationPoint(version=version, seconds=1.0, updates=1, loss=loss, metric=metric)


@pytest.fixture
def status():
    return Status(
        fleet="pumps", plan="0" * 32, epoch=3, state="running", stop_reason=None, moment=1000.0, seconds=60.0,
        connected=True, mqtt_version="5", version=7, published_version=6, buffered=2, goal=10,
        updates=Updates(received=14, applied=9, duplicate=1, rejected={"bad-signature": 2, "too-stale": 1},
                        waiting=1),
        ignored_messages=4, staleness={0: 5, 1: 4},
        evaluations=(evaluation(1, 0.5), evaluation(7, 0.875)), parameters=100, metric="accuracy",
        devices=(device("pump-1", online=True, applied=6, share=0.75),
                 device("pump-2", online=False, applied=3, share=0.25)),
        cpu_seconds=1.0, rss_bytes=1,
    )  # fmt: skip


def scrape(status):
    port = free_port()
    stop = serve_metrics(Metrics(port=port), lambda: status)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    finally:
        stop()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_every_reason_of_a_rejection_is_a_metric(status):
    metrics = scrape(status)
    assert metrics['fedtide_updates_total{reason="bad-signature",verdict="rejected"}'] == "2.0"
    assert metrics['fedtide_updates_total{reason="too-stale",verdict="rejected"}'] == "1.0"
    assert metrics['fedtide_updates_total{reason="",verdict="applied"}'] == "9.0"


def test_the_metrics_balance_like_the_accounting(status):
    metrics = scrape(status)
    judged = sum(float(value) for name, value in metrics.items() if name.startswith("fedtide_updates_total"))
    waiting = float(metrics["fedtide_updates_waiting"])
    assert float(metrics["fedtide_updates_received_total"]) == judged + waiting == 14


def test_devices_versions_and_evaluation_are_metrics(status):
    metrics = scrape(status)
    shown = ("devices_online", "devices_enrolled", "model_version", "published_version", "evaluation_metric")
    assert [metrics[f"fedtide_{name}"] for name in shown] == ["1.0", "2.0", "7.0", "6.0", "0.875"]
    assert metrics["fedtide_messages_ignored_total"] == "4.0"


def test_a_status_comes_back_from_its_file(status, tmp_path):
    StatusFile(tmp_path / "status.json", SYSTEM_CLOCK).write(lambda: status)
    assert read(tmp_path / "status.json") == status


@pytest.fixture
def released(status):
    """The same fleet with a release, examples held out on devices, and one device in trouble."""
    one, two = status.devices
    return msgspec.structs.replace(
        status,
        released_version=5,
        release_gate="accuracy at least 0.9 on the coordinator's held-out examples",
        federated=federated(7, 0.625, oldest=4),
        federated_history=(federated(4, 0.25), federated(7, 0.75)),
        troubles={"data.unusable": 3, "other": 1},
        keyframe_bytes=9_500,
        delta_bytes=320,
        rollbacks=2,
        last_rollback=RolledBack(version=12, good=7, why="Version 11: loss 9 is above", devices=("pump-1",)),
        devices=(
            msgspec.structs.replace(
                one, evaluation=DeviceEvaluation(version=7, examples=100, loss=0.5, metric=0.8125)
            ),
            msgspec.structs.replace(
                two, trouble=DeviceTrouble(event="data.unusable", detail="x.npz: no such file", version=6)
            ),
        ),
    )


def test_release_federated_metric_and_trouble_are_metrics(released):
    metrics = scrape(released)
    names = ("released_version", "federated_loss", "federated_metric", "federated_devices",
             "federated_examples", "devices_in_trouble", "keyframe_bytes", "delta_bytes")  # fmt: skip
    expected = ["5.0", "0.75", "0.625", "2.0", "1300.0", "1.0", "9500.0", "320.0"]
    assert [metrics[f"fedtide_{name}"] for name in names] == expected
    assert metrics['fedtide_trouble_reports_total{event="data.unusable"}'] == "3.0"
    assert metrics["fedtide_rollbacks_total"] == "2.0"


def test_what_nobody_has_found_yet_is_no_metric(status):
    metrics = scrape(status)
    assert metrics["fedtide_federated_devices"] == "0.0"
    assert {"fedtide_federated_metric", "fedtide_federated_loss", "fedtide_released_version"}.isdisjoint(
        metrics
    )


def test_an_operator_sees_the_release_and_the_devices_own_metric(released):
    text = shown(released, 1001.0)
    assert "held out: version 7  loss 0.5000  accuracy 0.8750 ▁█" in text
    assert (
        "devices:  versions 4 to 7  loss 0.7500  accuracy 0.6250 ▁█"
        "  (what 2 devices found on 1,300 of their examples)"
    ) in text
    assert (
        "released: version 5 (it passed accuracy at least 0.9 on the coordinator's held-out examples)" in text
    )
    assert "rolled back 2 times, last to version 7: Version 11: loss 9 is above" in text
    one, two = (line for line in text.splitlines() if line.startswith("pump-"))
    assert "0.812 at 7" in one
    assert one.endswith("rejected: too-stale")
    assert two.endswith("data.unusable: x.npz: no such file")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"released_version": 6}, "released: version 6 (every one is, no gate is set)"),
        ({"release_gate": "loss at most 1"}, "released: no version yet: none has passed loss at most 1"),
        ({}, "released: no version yet"),
    ],
)
def test_an_operator_sees_why_a_version_is_released_or_none_is(status, changes, said):
    assert said in shown(msgspec.structs.replace(status, **changes), 1001.0)


def test_a_status_with_everything_in_it_comes_back_from_its_file(released, tmp_path):
    StatusFile(tmp_path / "status.json", SYSTEM_CLOCK).write(lambda: released)
    assert read(tmp_path / "status.json") == released


def shown(status, now):
    console = Console(file=io.StringIO(), width=140)
    console.print(fleet_view(status, now))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_an_operator_sees_versions_accounting_and_who_is_away(status):
    text = shown(status, 1001.0)
    assert "version 7 (published 6)" in text
    assert (
        "received 14 = applied 9 + duplicate 1 + rejected 3 (bad-signature 2, too-stale 1) + waiting 1"
        in text
    )
    assert "accuracy 0.8750" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("pump-")] == [
        ["pump-1", "online"],
        ["pump-2", "away"],
    ]


def test_a_coordinator_that_stopped_writing_its_status_is_not_shown_as_running(status):
    assert "silent for 60 s" in shown(status, 1060.0)


def test_one_that_writes_its_status_rarely_is_silent_only_when_the_next_one_is_late(status):
    rarely = msgspec.structs.replace(status, interval_s=12.0)
    assert "running" in shown(rarely, 1016.0)
    assert "silent for 18 s" in shown(rarely, 1018.0)
