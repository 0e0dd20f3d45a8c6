"""The demo's picture: what happened, in four panels."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fedtide.demo.report import Report

_SPEEDS = ("fast", "slow", "dropping")


def draw(report: Report, path: Path) -> None:
    """Write ``report.png``."""
    figure, ((time, bytes_), (staleness, groups)) = plt.subplots(2, 2, figsize=(11, 7.5))
    _accuracy_over_time(time, report)
    _accuracy_over_bytes(bytes_, report)
    _staleness(staleness, report)
    _contribution(groups, report)
    figure.suptitle(
        f"{len(report.devices)} devices, {report.updates.applied:,} updates, {report.versions:,} versions: "
        f"{100 * report.accuracy:.1f} % held-out accuracy"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _points(report: Report) -> tuple[list[float], list[float]]:
    shown = [(point.seconds, point.metric) for point in report.evaluations if point.metric is not None]
    return [seconds for seconds, _ in shown], [metric for _, metric in shown]


def _accuracy_over_time(axes: Axes, report: Report) -> None:
    seconds, accuracy = _points(report)
    axes.plot(seconds, accuracy)
    axes.axhline(report.target_accuracy, color="grey", linestyle=":", linewidth=1)
    if report.seconds_to_target is not None:
        axes.axvline(report.seconds_to_target, color="grey", linestyle=":", linewidth=1)
    axes.set(title="Accuracy over time", xlabel="seconds", ylabel="held-out accuracy", ylim=(0, 1))


def _accuracy_over_bytes(axes: Axes, report: Report) -> None:
    seconds, accuracy = _points(report)
    moments = [point.seconds for point in report.traffic]
    uplink = np.interp(seconds, moments, [point.uplink_bytes / 1e6 for point in report.traffic])
    factor = report.uplink_bytes_float32 / max(1, report.uplink_bytes)
    axes.plot(uplink, accuracy, label=report.codec)
    axes.plot(uplink * factor, accuracy, linestyle="--", label="the same updates as float32")
    axes.set(title="Accuracy over uplink bytes", xlabel="MB sent by all devices", ylim=(0, 1))
    axes.legend(loc="lower right")


def _staleness(axes: Axes, report: Report) -> None:
    histogram = report.staleness_histogram
    axes.bar(list(histogram), list(histogram.values()), width=0.9)
    axes.set(title="Staleness of applied updates", xlabel="versions", ylabel="updates")


def _contribution(axes: Axes, report: Report) -> None:
    speeds = [speed for speed in _SPEEDS if any(device.speed == speed for device in report.devices)]
    places = np.arange(len(speeds))
    applied = max(1, report.updates.applied)
    columns = {
        "share of devices": [_share(report, speed, 1 / len(report.devices)) for speed in speeds],
        "share of updates": [
            sum(device.applied for device in report.devices if device.speed == speed) / applied
            for speed in speeds
        ],
        "share of weight": [
            sum(device.weight_share for device in report.devices if device.speed == speed) for speed in speeds
        ],
    }
    _grouped_bars(axes, places, columns.items())
    axes.set_xticks(places, speeds)
    axes.set(title="Contribution per device group", ylim=(0, 1))
    axes.legend()


def _share(report: Report, speed: str, each: float) -> float:
    return each * sum(device.speed == speed for device in report.devices)


def _grouped_bars(axes: Axes, places: object, columns: Iterable[tuple[str, list[float]]]) -> None:
    width = 0.27
    for number, (name, values) in enumerate(columns):
        axes.bar(np.asarray(places) + (number - 1) * width, values, width, label=name)
