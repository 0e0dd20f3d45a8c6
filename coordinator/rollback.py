"""Rollback: when a published version is so bad that training goes on from an earlier one. Pure.

Every version is finite: where aggregation overflows, ``model_state`` makes the next version of the parameters
before. What is finite and bad shows in the held-out evaluation. Versions are published first and evaluated
afterwards: an evaluation may take minutes, for which every device would wait at every version, and a single
bad result may be chance. Until the rollback devices train on a bad version in vain; what is used for
inference is the release gate's part, which looks before it releases.

Going back makes a new version, above all others, of the last good one's parameters. Updates that started from
an older version are refused: what was learned on a bad one would lead away from the good one.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Final, Protocol

import msgspec
from msgspec import Meta

from coordinator.status import RolledBack
from fedtide.wire.ids import DeviceId, ModelVersion

log = logging.getLogger(__name__)

_KEPT_NAMES: Final = 10_000
_MOST_NAMES: Final = 20


class Rollback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``[rollback]`` table: which held-out results are bad. Each limit given counts by itself.

    A loss that is not finite is bad without any limit, and at once.

    Attributes:
        loss_factor: a loss above so many times the lowest one so far. Where that one is negative, it is above
            it by more than ``loss_factor − 1`` times its size.
        metric_drop: a metric more than this below the highest so far; for one that is better when higher.
        metric_rise: a metric more than this above the lowest so far; for one that is better when lower.
        patience: so many bad results in a row lead back to the last version that was not bad.
    """

    loss_factor: Annotated[float, Meta(gt=1)] | None = None
    metric_drop: Annotated[float, Meta(gt=0)] | None = None
    metric_rise: Annotated[float, Meta(gt=0)] | None = None
    patience: Annotated[int, Meta(ge=1)] = 2


class Evaluated(Protocol):
    """A held-out result, as the journal keeps it: None where it was not finite, or there is no metric."""

    @property
    def version(self) -> ModelVersion:
        """Which."""

    @property
    def loss(self) -> float | None:
        """Mean over the held-out examples."""

    @property
    def metric(self) -> float | None:
        """Likewise."""


@dataclass(frozen=True)
class Standing:
    """What the evaluations so far come to.

    Attributes:
        good: the last version that was not bad; None before there was one.
        lowest_loss: of those that were not bad.
        highest_metric: likewise.
        lowest_metric: likewise.
        bad: results in a row that were bad, since the last good one or the last rollback.
        why: what was bad about the last one.
        due: whether it is time to go back.
    """

    good: ModelVersion | None = None
    lowest_loss: float | None = None
    highest_metric: float | None = None
    lowest_metric: float | None = None
    bad: int = 0
    why: str = ""
    due: bool = False


def after(standing: Standing, result: Evaluated, limits: Rollback) -> Standing:
    """What the evaluations come to with one more."""
    why = _fault(standing, result, limits)
    if why is None:
        return Standing(
            good=result.version,
            lowest_loss=_least(standing.lowest_loss, result.loss),
            highest_metric=_most(standing.highest_metric, result.metric),
            lowest_metric=_least(standing.lowest_metric, result.metric),
        )
    bad = standing.bad + 1
    due = result.loss is None or bad >= limits.patience
    return replace(standing, bad=bad, why=f"Version {result.version}: {why}", due=due)


def gone_back(standing: Standing) -> Standing:
    """What they come to once the rollback is done: limits stay, patience begins anew."""
    return replace(standing, bad=0, why="", due=False)


def so_far(results: Iterable[Evaluated], limits: Rollback, line_since: ModelVersion) -> Standing:
    """What an earlier run's results come to.

    Args:
        results: oldest version first.
        limits: from the settings now.
        line_since: version of the last reset; a rollback that was due before it has been done.
    """
    standing = Standing()
    for result in results:
        standing = after(standing, result, limits)
        if standing.due and result.version < line_since:
            standing = gone_back(standing)
    return standing


def _fault(standing: Standing, result: Evaluated, limits: Rollback) -> str | None:
    """What is bad about a result; None: nothing."""
    if result.loss is None:
        return "the loss is not finite"
    best, factor = standing.lowest_loss, limits.loss_factor
    if best is not None and factor is not None and result.loss > best + (factor - 1) * abs(best):
        return f"loss {result.loss:g} is above {factor:g} times the lowest, {best:g}"
    top, drop = standing.highest_metric, limits.metric_drop
    if top is not None and drop is not None and (result.metric is None or result.metric < top - drop):
        return f"metric {_shown(result.metric)} is more than {drop:g} below the highest, {top:g}"
    low, rise = standing.lowest_metric, limits.metric_rise
    if low is not None and rise is not None and (result.metric is None or result.metric > low + rise):
        return f"metric {_shown(result.metric)} is more than {rise:g} above the lowest, {low:g}"
    return None


def _shown(metric: float | None) -> str:
    return "not finite" if metric is None else f"{metric:g}"


def _least(one: float | None, other: float | None) -> float | None:
    return min((each for each in (one, other) if each is not None), default=None)


def _most(one: float | None, other: float | None) -> float | None:
    return max((each for each in (one, other) if each is not None), default=None)


class Contributors:
    """Whose updates are in which version: of as many of the last versions as ten thousand names allow."""

    def __init__(self) -> None:
        self._devices: OrderedDict[ModelVersion, set[DeviceId]] = OrderedDict()
        self._names = 0

    def note(self, version: ModelVersion, device: DeviceId) -> None:
        """An update of this device was folded into what becomes this version."""
        devices = self._devices.setdefault(version, set())
        self._names += device not in devices
        devices.add(device)
        while self._names > _KEPT_NAMES and len(self._devices) > 1:
            self._names -= len(self._devices.popitem(last=False)[1])

    def between(self, good: ModelVersion, bad: ModelVersion) -> list[DeviceId]:
        """Whose updates led from one version to a later one."""
        found = (devices for version, devices in self._devices.items() if good < version <= bad)
        return sorted(set[DeviceId]().union(*found))


class Rollbacks:
    """The rollbacks of this run, for people.

    Attributes:
        count: how many.
        last: the last one.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last: RolledBack | None = None

    def note(self, rolled_back: RolledBack) -> None:
        """One has been done."""
        self.count, self.last = self.count + 1, rolled_back
        names = rolled_back.devices[:_MOST_NAMES]
        more = len(rolled_back.devices) - len(names)
        log.error(
            "Version %d has the parameters of version %d again. %s. Since then there were updates of: %s%s",
            rolled_back.version, rolled_back.good, rolled_back.why, ", ".join(names) or "nobody known",
            f" and {more} others" if more else "", extra={"event": "version.rolled_back"},
        )  # fmt: skip
