"""The demo's report: counted figures, as ``report.json`` and as a summary for people."""

from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from coordinator.status import EvaluationPoint, Status


class StalenessSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Over all applied updates, in versions."""

    mean: float
    p50: int
    p95: int
    max: int


class UpdateCounts(msgspec.Struct, frozen=True, kw_only=True):
    """``sent`` is counted by the devices, the rest by the coordinator."""

    sent: int
    received: int
    applied: int
    duplicate: int
    rejected: dict[str, int]
    waiting: int


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part."""

    device: str
    speed: str
    applied: int
    mean_staleness: float
    weight_share: float


class TrafficPoint(msgspec.Struct, frozen=True, kw_only=True):
    """MQTT PUBLISH bytes of all devices up to a moment, in seconds since the coordinator began."""

    seconds: float
    uplink_bytes: int
    downlink_bytes: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the demo measured.

    Attributes:
        accuracy: of the last evaluated version on the held-out images.
        best_accuracy: of any evaluated version.
        target_accuracy: what was to be reached.
        seconds_to_target: from the coordinator's start; None if it was not reached.
        seconds: how long the fleet ran.
        versions: model versions made.
        updates: the accounting.
        staleness: of the applied updates.
        staleness_histogram: how many updates had which staleness.
        uplink_bytes: MQTT PUBLISH packets the devices sent, with their headers and topics.
        uplink_bytes_float32: what the same updates would take as bare float32.
        downlink_bytes: MQTT PUBLISH packets the devices received, receipts and heads among them.
        downlink_bytes_float32: what the models they trained on would take as bare float32.
        devices: each device's part.
        evaluations: held-out results over time.
        traffic: bytes over time.
        coordinator_cpu_seconds: of the coordinator's process.
        coordinator_rss_bytes: its peak.
        parameters: of the model.
        codec: of the updates.
        broker: mosquitto or nats.
        mqtt_version: spoken with it.
        seed: of everything random.
    """

    accuracy: float
    best_accuracy: float
    target_accuracy: float
    seconds_to_target: float | None
    seconds: float
    versions: int
    updates: UpdateCounts
    staleness: StalenessSummary
    staleness_histogram: dict[int, int]
    uplink_bytes: int
    uplink_bytes_float32: int
    downlink_bytes: int
    downlink_bytes_float32: int
    devices: tuple[DeviceReport, ...]
    evaluations: tuple[EvaluationPoint, ...]
    traffic: tuple[TrafficPoint, ...]
    coordinator_cpu_seconds: float
    coordinator_rss_bytes: int
    parameters: int
    codec: str
    broker: str
    mqtt_version: str
    seed: int


def summarise_staleness(histogram: dict[int, int]) -> StalenessSummary:
    """Mean and percentiles of a histogram; zeros when it is empty."""
    if not histogram:
        return StalenessSummary(mean=0.0, p50=0, p95=0, max=0)
    values = np.array(sorted(histogram))
    counts = np.array([histogram[int(value)] for value in values])
    reached = np.cumsum(counts) / counts.sum()
    return StalenessSummary(
        mean=float((values * counts).sum() / counts.sum()),
        p50=int(values[np.searchsorted(reached, 0.5)]),
        p95=int(values[np.searchsorted(reached, 0.95)]),
        max=int(values[-1]),
    )


def seconds_to_target(evaluations: tuple[EvaluationPoint, ...], target: float) -> float | None:
    """When the metric first reached the target."""
    return next((point.seconds for point in evaluations if (point.metric or 0.0) >= target), None)


def update_counts(status: Status, sent: int) -> UpdateCounts:
    """The coordinator's accounting with what the devices counted."""
    updates = status.updates
    return UpdateCounts(
        sent=sent,
        received=updates.received,
        applied=updates.applied,
        duplicate=updates.duplicate,
        rejected=updates.rejected,
        waiting=updates.waiting,
    )


def write(report: Report, path: Path) -> None:
    """Write ``report.json``, indented."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


def summary(report: Report) -> Table:
    """The figures that matter, for the terminal."""
    reached = report.seconds_to_target
    updates, staleness = report.updates, report.staleness
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(updates.rejected.items())) or "none"
    up = report.uplink_bytes_float32 / max(1, report.uplink_bytes)
    down = report.downlink_bytes_float32 / max(1, report.downlink_bytes)
    slow = sum(device.weight_share for device in report.devices if device.speed == "slow")
    rows = {
        "held-out accuracy": f"{report.accuracy:.4f} (target {report.target_accuracy:g}: "
        + (f"reached after {reached:.1f} s)" if reached is not None else "not reached)"),
        "model versions": f"{report.versions:,} in {report.seconds:.1f} s",
        "updates": f"{updates.applied:,} applied, {updates.duplicate:,} duplicate, rejected: {rejected}",
        "staleness": f"mean {staleness.mean:.1f} versions, p95 {staleness.p95}, max {staleness.max}",
        "bytes up": f"{megabytes(report.uplink_bytes)}, 1/{up:.0f} of the updates as float32 "
        f"({report.codec}; envelopes, events and MQTT headers counted)",
        "bytes down": f"{megabytes(report.downlink_bytes)}, 1/{down:.0f} of the models as float32 "
        "(heads and receipts counted)",
        "slow devices": f"{100 * slow:.1f} % of the weight",
        "coordinator": f"{report.coordinator_cpu_seconds:.1f} CPU s, peak "
        f"{megabytes(report.coordinator_rss_bytes)}",
        "broker": f"{report.broker}, MQTT {report.mqtt_version}",
    }
    table = Table(show_header=False, box=None, title="Summary", title_justify="left", pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def megabytes(size_bytes: int) -> str:
    """1,234,567 → ``1.2 MB``."""
    return f"{size_bytes / 1e6:.1f} MB"
