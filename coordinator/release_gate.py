"""The gate: which model versions are released for inference. Pure."""

from typing import Final

from coordinator.settings import ReleaseGate
from fedtide.wire.plan import PlanManifest
from fedtide.wire.settings import SettingsError

_WHERE: Final = {
    "held-out": "on the coordinator's held-out examples",
    "federated": "on the examples that at least {} devices hold out",
}


def passes(gate: ReleaseGate, loss: float | None, metric: float | None) -> bool:
    """Whether every threshold given is met; one whose value is not there is not.

    Args:
        gate: the thresholds.
        loss: finite, or None.
        metric: finite, or None.
    """
    return (
        (gate.metric_at_least is None or (metric is not None and metric >= gate.metric_at_least))
        and (gate.metric_at_most is None or (metric is not None and metric <= gate.metric_at_most))
        and (gate.loss_at_most is None or (loss is not None and loss <= gate.loss_at_most))
    )


def sentence(gate: ReleaseGate, metric: str | None) -> str:
    """The gate for people, as devices show it: ``accuracy at least 0.9 on the coordinator's …``."""
    name = metric or "metric"
    thresholds = (
        (f"{name} at least", gate.metric_at_least),
        (f"{name} at most", gate.metric_at_most),
        ("loss at most", gate.loss_at_most),
    )
    given = " and ".join(f"{words} {value:g}" for words, value in thresholds if value is not None)
    return f"{given} {_WHERE[gate.on].format(gate.min_devices)}"


def check_gate(gate: ReleaseGate | None, manifest: PlanManifest) -> None:
    """Check that versions of this plan can pass.

    Raises:
        SettingsError: the gate asks for a metric, and the plan has none.
    """
    if gate is None or manifest.metric is not None:
        return
    if gate.metric_at_least is not None or gate.metric_at_most is not None:
        raise SettingsError(
            f"the release gate asks for a metric and plan {manifest.name!r} has none; use loss_at_most"
        )
