"""The staleness policies against the papers' formulas, worked out by hand.

The ``check_*`` functions are golden checks: test_planted_defects.py shows that each fails on a wrong formula.
"""

import math
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.staleness import (
    SMALLEST_WEIGHT,
    Constant,
    Cutoff,
    Exponential,
    Hinge,
    Polynomial,
    StalenessPolicy,
)

Weight = Callable[[int], float | None]

POLICIES = [
    Constant(),
    Polynomial(),
    Polynomial(exponent=2.0),
    Hinge(),
    Exponential(rate=math.log(2)),
    Cutoff(at=3),
]


ROOT = Polynomial(exponent=0.5)
HINGE = Hinge(a=10.0, b=4)


def check_polynomial(weight: Weight = ROOT.weight) -> None:
    """s(tau) = (1 + tau)^-1/2."""
    assert weight(0) == 1.0  # 1 / sqrt(1): a fresh update counts fully
    assert weight(1) == pytest.approx(0.7071067811865475)  # 1 / sqrt(2)
    assert weight(3) == pytest.approx(0.5)  # 1 / sqrt(4)
    assert weight(8) == pytest.approx(1 / 3)  # 1 / sqrt(9)


def check_hinge(weight: Weight = HINGE.weight) -> None:
    """s(tau) = 1 for tau <= 4, then 1 / (10 (tau - 4) + 1)."""
    assert [weight(staleness) for staleness in range(5)] == [1.0] * 5  # up to the knee itself
    assert weight(5) == pytest.approx(1 / 11)  # 1 / (10 * 1 + 1)
    assert weight(7) == pytest.approx(1 / 31)  # 1 / (10 * 3 + 1)


def test_the_polynomial_policy_follows_its_formula():
    check_polynomial()


def test_the_polynomial_exponent_is_a_setting():
    assert Polynomial(exponent=1.0).weight(3) == 0.25  # (1 + 3)^-1
    assert Polynomial(exponent=2.0).weight(3) == 0.0625  # (1 + 3)^-2


def test_the_hinge_policy_follows_its_formula_on_both_sides_of_the_knee():
    check_hinge()


def test_the_hinge_does_not_jump_when_it_is_shallow():
    # a = 1e-3: one version past the knee 1 / 1.001.
    assert Hinge(a=1e-3, b=4).weight(5) == pytest.approx(0.999, abs=1e-6)


def test_the_constant_policy_gives_every_update_the_weight_one():
    assert [Constant().weight(staleness) for staleness in (0, 1, 1_000_000)] == [1.0, 1.0, 1.0]


def test_the_exponential_policy_with_rate_ln_2_halves_the_weight_with_each_version():
    policy = Exponential(rate=math.log(2))

    assert [policy.weight(staleness) for staleness in range(4)] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])


def test_the_cutoff_policy_admits_up_to_its_bound_and_no_further():
    assert [Cutoff(at=2).weight(staleness) for staleness in range(5)] == [1.0, 1.0, 1.0, None, None]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_fresh_update_has_weight_one(policy):
    assert policy.weight(0) == 1.0


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_an_update_is_too_stale_beyond_max_staleness(policy):
    bounded = msgspec.structs.replace(policy, max_staleness=2)

    assert bounded.weight(2) == policy.weight(2)
    assert bounded.weight(3) is None


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_max_staleness_zero_admits_only_fresh_updates(policy):
    synchronous = msgspec.structs.replace(policy, max_staleness=0)

    assert (synchronous.weight(0), synchronous.weight(1)) == (1.0, None)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@given(staleness=st.integers(0, 30) | st.integers(0, 2**63))
def test_a_staler_update_never_counts_more(policy, staleness):
    # Too stale (None) counts as 0.
    weight, staler = policy.weight(staleness) or 0.0, policy.weight(staleness + 1) or 0.0

    assert 0.0 <= staler <= weight <= 1.0
    assert weight == 0.0 or weight >= SMALLEST_WEIGHT


def test_a_weight_too_small_to_change_a_float32_sum_is_too_stale():
    # 2^-24 is the smallest weight: with rate ln 2, staleness 23 gives 2^-23 and staleness 25 gives 2^-25.
    policy = Exponential(rate=math.log(2))

    assert policy.weight(23) == pytest.approx(2.0**-23)
    assert policy.weight(25) is None


def test_an_exponential_that_underflows_to_zero_is_too_stale():
    assert Exponential(rate=100.0).weight(2**63) is None


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_negative_staleness_is_refused(policy):
    with pytest.raises(ValueError, match="staleness -1: the base version is newer"):
        policy.weight(-1)


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"kind": "constant"}, Constant()),
        ({"kind": "polynomial"}, Polynomial(exponent=0.5)),
        ({"kind": "polynomial", "exponent": 1}, Polynomial(exponent=1.0)),
        ({"kind": "hinge", "max_staleness": 9}, Hinge(a=10.0, b=4, max_staleness=9)),
        ({"kind": "exponential", "rate": 0.1}, Exponential(rate=0.1)),
        ({"kind": "cutoff", "at": 0}, Cutoff(at=0)),
    ],
)
def test_settings_decode_into_the_policy_itself(settings, policy):
    assert msgspec.convert(settings, StalenessPolicy) == policy


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "polynomail"}, r"Invalid value 'polynomail' - at `\$\.kind`"),
        ({"exponent": 0.5}, "missing required field `kind`"),
        ({"kind": "polynomial", "exponnent": 1.0}, "unknown field `exponnent`"),
        ({"kind": "polynomial", "exponent": 0.0}, r"> 0\.0 - at `\$\.exponent`"),
        ({"kind": "polynomial", "exponent": math.nan}, r"> 0\.0 - at `\$\.exponent`"),
        ({"kind": "polynomial", "exponent": math.inf}, r"<= 100\.0 - at `\$\.exponent`"),
        ({"kind": "polynomial", "exponent": "0.5"}, r"got `str` - at `\$\.exponent`"),
        ({"kind": "polynomial", "max_staleness": -1}, r">= 0 - at `\$\.max_staleness`"),
        ({"kind": "hinge", "a": -10.0}, r"> 0\.0 - at `\$\.a`"),
        ({"kind": "hinge", "b": 1.5}, r"got `float` - at `\$\.b`"),
        ({"kind": "exponential"}, "missing required field `rate`"),
        ({"kind": "cutoff", "at": -1}, r">= 0 - at `\$\.at`"),
    ],
)
def test_a_wrong_setting_is_an_error_that_says_where(settings, complaint):
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(settings, StalenessPolicy)
