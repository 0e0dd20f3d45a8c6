"""Status: what an operator sees, as one value, written to ``status.json`` while the coordinator runs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from fedtide.wire.clock import Clock
from fedtide.wire.ids import DeviceId, Epoch, FleetId, ModelVersion, PlanId

log = logging.getLogger(__name__)

_SHORTEST_S: Final = 0.5
_LONGEST_S: Final = 15.0
_SHARE: Final = 0.02
"""Of the coordinator's time, for its status."""


class DeviceEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a device found on the examples it holds out, before it trained on the version."""

    version: ModelVersion
    examples: int
    loss: float
    metric: float | None


class DeviceTrouble(msgspec.Struct, frozen=True, kw_only=True):
    """Why a device does not train, in its own words.

    Attributes:
        event: one word for machines.
        detail: one sentence for people.
        version: the model version it concerns, or None.
    """

    event: str
    detail: str
    version: ModelVersion | None


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One device.

    Attributes:
        device: its id.
        online: by its presence.
        model_version: what it said it holds.
        applied: its updates applied.
        rejected: its updates rejected after their signature was checked.
        mean_staleness: of the applied ones, in versions.
        weight_share: its part of all aggregation weight so far, 0 to 1.
        last_rejection: why its latest update was rejected, if it was.
        loss: of its latest local training.
        evaluation: what it found on the examples it holds out, if it does.
        trouble: why it does not train, if it says so.
    """

    device: DeviceId
    online: bool
    model_version: ModelVersion | None
    applied: int
    rejected: int
    mean_staleness: float
    weight_share: float
    last_rejection: str | None
    loss: float | None
    evaluation: DeviceEvaluation | None = None
    trouble: DeviceTrouble | None = None


class Updates(msgspec.Struct, frozen=True, kw_only=True):
    """The accounting: received = applied + duplicate + rejected + waiting."""

    received: int
    applied: int
    duplicate: int
    rejected: dict[str, int]
    waiting: int


class EvaluationPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A held-out result; ``seconds`` since this run of the coordinator began. None: not finite."""

    version: ModelVersion
    seconds: float
    updates: int
    loss: float | None
    metric: float | None


class FederatedMetric(msgspec.Struct, frozen=True, kw_only=True):
    """Means of what devices found on the examples they hold out, weighted by their number.

    Attributes:
        oldest_version: evaluated by a device that counts.
        version: the newest one evaluated by a device that counts.
        devices: how many count.
        examples: how many they hold out.
        loss: mean.
        metric: mean, or None if the plan has none.
    """

    oldest_version: ModelVersion
    version: ModelVersion
    devices: int
    examples: int
    loss: float
    metric: float | None


class RolledBack(msgspec.Struct, frozen=True, kw_only=True):
    """A version that has an earlier one's parameters again.

    Attributes:
        version: its number.
        good: whose parameters.
        why: what was wrong with those in between.
        devices: whose updates those were made of, as far as this run knows.
    """

    version: ModelVersion
    good: ModelVersion
    why: str
    devices: tuple[DeviceId, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator at one moment.

    Attributes:
        fleet: which fleet.
        plan: the plan in force.
        epoch: which run of the coordinator.
        state: ``running``, ``stopped`` (a stop condition held) or ``offline`` (shut down).
        stop_reason: the condition that held.
        moment: seconds since 1970.
        seconds: since this run began.
        connected: to the broker.
        mqtt_version: ``5`` or ``3.1.1``.
        version: the newest model version.
        published_version: the newest one devices were offered.
        buffered: updates in the buffer.
        goal: updates per version.
        updates: the accounting.
        ignored_messages: presence and events that could not be read.
        staleness: how many applied updates had which staleness, in this run, by versions.
        evaluations: held-out results of this run, oldest first.
        parameters: number of parameters.
        metric: name of the metric.
        devices: all enrolled devices.
        released_version: the newest version released for inference.
        release_gate: what it had to pass, for people; None: no gate is set.
        federated: what the devices find on the examples they hold out, now.
        federated_history: the same for each version by itself, oldest first.
        troubles: how many reports of trouble came, by their word, in this run.
        keyframe_bytes: of the last published version, whole.
        delta_bytes: of what changed since the version before it; None where there is no delta.
        rollbacks: how many versions had to be taken back, in this run.
        last_rollback: the last of them.
        cpu_seconds: of this process.
        rss_bytes: peak resident memory of this process.
        interval_s: seconds between this status and the next.
    """

    fleet: FleetId
    plan: PlanId
    epoch: Epoch
    state: str
    stop_reason: str | None
    moment: float
    seconds: float
    connected: bool
    mqtt_version: str | None
    version: ModelVersion
    published_version: ModelVersion | None
    buffered: int
    goal: int
    updates: Updates
    ignored_messages: int
    staleness: dict[int, int]
    evaluations: tuple[EvaluationPoint, ...]
    parameters: int
    metric: str | None
    devices: tuple[DeviceStatus, ...]
    cpu_seconds: float
    rss_bytes: int
    released_version: ModelVersion | None = None
    release_gate: str | None = None
    federated: FederatedMetric | None = None
    federated_history: tuple[FederatedMetric, ...] = ()
    troubles: dict[str, int] = {}
    keyframe_bytes: int | None = None
    delta_bytes: int | None = None
    rollbacks: int = 0
    last_rollback: RolledBack | None = None
    interval_s: float = 0.5


def peak_rss_bytes() -> int:
    """Peak resident memory of this process: Linux's VmHWM.

    ``getrusage`` would also count what the parent had resident when it started us.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class StatusFile:
    """``status.json``, written as often as what it costs allows.

    That of 10,000 devices takes a tenth of a second to put together: twice a second, it would take a fifth of
    the coordinator's time.

    Args:
        path: the file.
        clock: tells the time.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._interval_s = _SHORTEST_S
        self._due = float("-inf")

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next one."""
        return self._clock.now() >= self._due

    def write(self, status: Callable[[], Status]) -> Status:
        """Put a status together and replace the file in one step; not synced, because a new one comes soon.

        Returns:
            What was written.
        """
        began = self._clock.now()
        written = msgspec.structs.replace(status(), interval_s=self._interval_s)
        temporary = self._path.with_name(self._path.name + ".new")
        try:
            temporary.write_bytes(msgspec.json.encode(written))
            temporary.replace(self._path)
        except OSError as error:  # the journal says better what a full disk means
            log.warning("%s cannot be written: %s", self._path, error, extra={"event": "status.not_written"})
        cost_s = self._clock.now() - began
        self._interval_s = min(max(_SHORTEST_S, cost_s / _SHARE), _LONGEST_S)
        self._due = began + self._interval_s
        return written


def read(path: Path) -> Status:
    """What :class:`StatusFile` wrote.

    Raises:
        FileNotFoundError: no coordinator has run here.
        msgspec.ValidationError: written by another version of fedtide.
    """
    return msgspec.json.decode(path.read_bytes(), type=Status)
