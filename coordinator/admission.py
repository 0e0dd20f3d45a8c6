"""Admission: does this update count, and how much? Pure: a weight, or a rejection with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.settings import CoordinatorSettings
from fedtide.wire.codecs import CODECS
from fedtide.wire.envelope import UpdateHeader
from fedtide.wire.ids import FleetId, ModelVersion, PlanId
from fedtide.wire.messages import Reason


@dataclass(frozen=True)
class Rejection:
    """Why an update does not count.

    Attributes:
        reason: for metrics and for the device.
        detail: one sentence for people: what was wrong, with which value, and what would be right.
    """

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Admitted:
    """How much an update counts.

    Attributes:
        staleness: current version − base version, in versions.
        staleness_weight: s(τ).
        importance: 1, or the number of examples.
    """

    staleness: int
    staleness_weight: float
    importance: float


@dataclass(frozen=True)
class Terms:
    """What an update is measured against.

    Attributes:
        fleet: ours.
        plan: the plan in force.
        version: the current model version.
        published: fingerprints of the versions an update may start from.
        stopped: whether the run is over.
    """

    fleet: FleetId
    plan: PlanId
    version: ModelVersion
    published: Mapping[ModelVersion, bytes]
    stopped: bool


def admit(header: UpdateHeader, terms: Terms, settings: CoordinatorSettings) -> Admitted | Rejection:
    """Decide on an update whose signature has been checked and whose payload has not been decoded."""
    refused = _refuse_kind(header, terms) or _refuse_content(header) or _refuse_base(header, terms)
    if refused:
        return refused
    staleness = terms.version - header.base_version
    limit = settings.aggregator.max_staleness
    weight = settings.staleness.weight(staleness) if limit is None or staleness <= limit else None
    if weight is None:
        return Rejection(
            Reason.TOO_STALE,
            f"trained on version {header.base_version}, which is {staleness} versions old; "
            f"the newest is {terms.version}",
        )
    return Admitted(staleness, weight, _importance(header, settings))


def _refuse_kind(header: UpdateHeader, terms: Terms) -> Rejection | None:
    if header.fleet != terms.fleet:
        return Rejection(Reason.WRONG_FLEET, f"for fleet {header.fleet[:80]!r}; this is {terms.fleet!r}")
    if terms.stopped:
        return Rejection(Reason.STOPPED, "the run has stopped; no more updates are taken")
    if header.plan != terms.plan:
        return Rejection(
            Reason.UNKNOWN_PLAN, f"for plan {header.plan[:80]!r}; the plan in force is {terms.plan!r}"
        )
    return None


def _refuse_content(header: UpdateHeader) -> Rejection | None:
    if header.mask is not None or header.inner:
        return Rejection(
            Reason.UNSUPPORTED_FIELD, "masked and summed updates are not supported by this coordinator"
        )
    if header.codec not in CODECS:
        return Rejection(
            Reason.UNKNOWN_CODEC, f"codec {header.codec[:80]!r}; this coordinator has {', '.join(CODECS)}"
        )
    if header.num_examples < 1:
        return Rejection(Reason.MALFORMED, "trained on 0 examples; at least 1 is needed")
    return None


def _refuse_base(header: UpdateHeader, terms: Terms) -> Rejection | None:
    if header.base_version > terms.version:
        return Rejection(
            Reason.FUTURE_VERSION,
            f"trained on version {header.base_version}; the newest is {terms.version}",
        )
    fingerprint = terms.published.get(header.base_version)
    if fingerprint is None:
        return Rejection(
            Reason.UNKNOWN_BASE,
            f"trained on version {header.base_version}, which was not published or is no longer kept",
        )
    if fingerprint != header.base_sha256:
        return Rejection(
            Reason.UNKNOWN_BASE,
            f"trained on other parameters than the published version {header.base_version}",
        )
    return None


def _importance(header: UpdateHeader, settings: CoordinatorSettings) -> float:
    if not settings.update.weight_by_examples:
        return 1.0
    return float(min(header.num_examples, settings.update.max_examples))
