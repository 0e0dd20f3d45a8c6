"""Staleness policies: what an update costs for each model version that appeared while its device trained.

Staleness tau is the current version minus the base version, in versions, never in seconds. A policy turns it
into the staleness weight s(tau), a float in (0, 1] with s(0) = 1, or into ``None``: too stale to be admitted.
The weight is computed once, at admission, and journaled beside the update, so neither a later change of
policy nor another machine's ``pow`` and ``exp`` can change what a replay gives.

Settings decode straight into the policy that does the work; ``kind`` chooses it::

    [staleness]
    kind = "polynomial"
    exponent = 0.5
    max_staleness = 50

Sources: Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization" (FedAsync), section 5.2, for the
constant, polynomial and hinge policies; Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous
Aggregation" (FedBuff), for the polynomial with exponent 1/2.
"""

import math
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

SMALLEST_WEIGHT: Final = 2.0**-24
"""A smaller weight is too stale. Beside a fresh update, a float32 sum loses anything below half a unit in its
last place, 2^-24; an update is better rejected where its device can see it than admitted without effect. The
aggregators refuse smaller weights, so this may be lowered but not raised: old journals must still replay."""

Versions: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A number of model versions."""


class _Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every policy has.

    Attributes:
        max_staleness: a staler update is rejected, in versions; ``None`` sets no bound.
    """

    max_staleness: Versions | None = None

    def weight(self, staleness: int) -> float | None:
        """Give the staleness weight s(tau), or ``None`` for an update that is too stale.

        The weight is at least ``SMALLEST_WEIGHT`` and at most 1.

        Args:
            staleness: current version minus base version; 0 for a fresh update.

        Raises:
            ValueError: a negative staleness: the update claims a base version that does not exist yet.
        """
        if staleness < 0:
            raise ValueError(f"staleness {staleness}: the base version is newer than the current version")
        if self.max_staleness is not None and staleness > self.max_staleness:
            return None
        weight = self._decay(staleness)
        return weight if weight >= SMALLEST_WEIGHT else None

    def _decay(self, staleness: int) -> float:
        """Evaluate the policy's formula s(tau), in [0, 1]."""
        raise NotImplementedError


class Constant(_Policy, frozen=True, tag="constant"):
    """s(tau) = 1: an update counts alike however stale it is (Xie et al. 2019)."""

    def _decay(self, staleness: int) -> float:  # noqa: ARG002 - this formula has no tau in it
        return 1.0


class Polynomial(_Policy, frozen=True, tag="polynomial"):
    """s(tau) = (1 + tau)^-a (Xie et al. 2019).

    Attributes:
        exponent: a; 1/2 in the experiments of both papers.
    """

    exponent: Annotated[float, Meta(gt=0, le=100)] = 0.5

    def _decay(self, staleness: int) -> float:
        return float((1.0 + staleness) ** -self.exponent)


class Hinge(_Policy, frozen=True, tag="hinge"):
    """s(tau) = 1 while tau <= b, then 1 / (a (tau - b) + 1) (Xie et al. 2019).

    The two branches meet at tau = b, where the second would give 1 too.

    Attributes:
        a: steepness after the knee; the paper's value is 10.
        b: the knee, in versions; the paper's value is 4.
    """

    a: Annotated[float, Meta(gt=0, le=1e6)] = 10.0
    b: Versions = 4

    def _decay(self, staleness: int) -> float:
        if staleness <= self.b:
            return 1.0
        return 1.0 / (self.a * (staleness - self.b) + 1.0)


class Exponential(_Policy, frozen=True, tag="exponential"):
    """s(tau) = e^(-rate tau).

    Attributes:
        rate: per version; ln 2 halves the weight with each version.
    """

    rate: Annotated[float, Meta(gt=0, le=100)]

    def _decay(self, staleness: int) -> float:
        return math.exp(-self.rate * staleness)


class Cutoff(_Policy, frozen=True, tag="cutoff"):
    """s(tau) = 1 while tau <= at; anything staler is too stale.

    Attributes:
        at: the last staleness admitted, in versions.
    """

    at: Versions

    def _decay(self, staleness: int) -> float:
        return 1.0 if staleness <= self.at else 0.0


StalenessPolicy: TypeAlias = Constant | Polynomial | Hinge | Exponential | Cutoff
"""Every policy: the one table of choices. Decode settings into this type."""
