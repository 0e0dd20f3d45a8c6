"""The aggregators against the papers' equations: two devices, two parameters, numbers worked out by hand.

The ``check_*`` functions are golden checks. Each takes the pieces of a small coordinator and defaults to the
real ones; test_planted_defects.py passes wrong pieces in and shows that the checks fail.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import aggregation
from coordinator.aggregation import Aggregator, Buffer, FedAsync, FedAvg, FedBuff, empty_buffer
from coordinator.server_optimizers import SGD, Adam
from coordinator.staleness import Constant, Polynomial

INVERSE = Polynomial(exponent=1.0)
"""s(tau) = 1 / (1 + tau): 1, 1/2, 1/3 for staleness 0, 1, 2."""

FEDASYNC = FedAsync(mixing=0.5)
FEDBUFF = FedBuff(goal=2)
FEDBUFF_NORMALISED = FedBuff(goal=2, normalise_staleness=True)
FEDAVG = FedAvg(cohort=2)
FULL_STEPS = SGD(learning_rate=1.0)
HALF_STEPS = SGD(learning_rate=0.5)


@dataclass(frozen=True)
class Update:
    """One device's contribution, as the small coordinator below receives it."""

    device: str
    base_version: int
    delta: tuple[float, ...]
    num_examples: int = 1


def vector(*numbers):
    return np.array(numbers, np.float32)


def versions_behind(update, current_version, earlier):
    """Staleness as it should be: the version an update meets minus the one its device started from.

    ``earlier`` says at which version each device's last update arrived; only a planted defect reads it.
    """
    return current_version - update.base_version


def run(
    updates: Sequence[Update],
    *,
    aggregator,
    policy,
    optimizer=FULL_STEPS,
    staleness=versions_behind,
    by_examples=False,
):
    """Fold the updates in order, starting from parameters (0, 0); give the parameters of every version."""
    versions = [np.zeros(2, np.float32)]
    state = optimizer.init(2)
    buffer = empty_buffer(2)
    earlier: dict[str, int] = {}
    for update in updates:
        current_version = len(versions) - 1
        weight = policy.weight(staleness(update, current_version, earlier))
        earlier[update.device] = current_version
        if weight is None:
            continue
        buffer = aggregator.fold(
            buffer,
            vector(*update.delta),
            staleness_weight=weight,
            importance=update.num_examples if by_examples else 1.0,
            current=versions[-1],
            base=versions[update.base_version],
        )
        if buffer.count == aggregator.goal:
            state, parameters = optimizer.apply(state, versions[-1], aggregator.aggregated_delta(buffer))
            versions.append(parameters)
            buffer = empty_buffer(2)
    return versions


def assert_versions(actual, *expected):
    assert len(actual) == len(expected)
    for parameters, numbers in zip(actual, expected, strict=True):
        np.testing.assert_allclose(parameters, numbers, rtol=1e-6, atol=1e-6)


FEDASYNC_UPDATES = (
    Update("a", 0, (4.0, 8.0)),
    Update("b", 0, (8.0, -8.0)),
    Update("a", 2, (1.0, 2.0)),
    Update("b", 1, (8.0, 4.0)),
)


def check_fedasync_history(aggregator=FEDASYNC, policy=INVERSE, staleness=versions_behind):
    """x_t = (1 - alpha_t) x_(t-1) + alpha_t x_new, with alpha = 1/2 and s = 1 / (1 + tau)."""
    versions = run(FEDASYNC_UPDATES, aggregator=aggregator, policy=policy, staleness=staleness)

    assert_versions(
        versions,
        (0, 0),
        # tau 0, alpha_t 1/2; local model (0,0)+(4,8) = (4,8):       1/2 (0,0) + 1/2 (4,8)
        (2, 4),
        # tau 1, alpha_t 1/4; local model (0,0)+(8,-8) = (8,-8):     3/4 (2,4) + 1/4 (8,-8) = (1.5+2, 3-2)
        (3.5, 1),
        # tau 0, alpha_t 1/2; local model (3.5,1)+(1,2) = (4.5,3):   1/2 (3.5,1) + 1/2 (4.5,3)
        (4, 2),
        # tau 2, alpha_t 1/6; local model (2,4)+(8,4) = (10,8):      5/6 (4,2) + 1/6 (10,8) = (30/6, 18/6)
        (5, 3),
    )


FEDBUFF_UPDATES = (
    Update("a", 0, (2.0, 4.0)),
    Update("b", 0, (4.0, -2.0)),
    Update("b", 0, (8.0, 4.0)),
    Update("a", 1, (2.0, 2.0)),
    Update("b", 0, (3.0, 6.0)),
    Update("a", 2, (1.0, 0.0)),
)


def check_fedbuff_history(
    aggregator=FEDBUFF, policy=INVERSE, optimizer=FULL_STEPS, staleness=versions_behind
):
    """w <- w + eta_g (sum of s_i delta_i) / K, with K = 2, eta_g = 1 and s = 1 / (1 + tau)."""
    versions = run(
        FEDBUFF_UPDATES, aggregator=aggregator, policy=policy, optimizer=optimizer, staleness=staleness
    )

    assert_versions(
        versions,
        (0, 0),
        # both fresh: ((2,4) + (4,-2)) / 2 = (6,2) / 2
        (3, 1),
        # tau 1 and 0: (1/2 (8,4) + (2,2)) / 2 = (6,4) / 2 = (3,2); (3,1) + (3,2)
        (6, 3),
        # tau 2 and 0: (1/3 (3,6) + (1,0)) / 2 = (2,2) / 2 = (1,1); (6,3) + (1,1)
        (7, 4),
    )


def check_fedbuff_normalised_history(aggregator=FEDBUFF_NORMALISED, policy=INVERSE):
    """w <- w + (sum of s_i delta_i) / (sum of s_i): the same updates as above, divided by the weights."""
    versions = run(FEDBUFF_UPDATES, aggregator=aggregator, policy=policy)

    assert_versions(
        versions,
        (0, 0),
        # weights 1 and 1: (6,2) / 2
        (3, 1),
        # weights 1/2 and 1: (6,4) / 1.5 = (4, 8/3)
        (7, 1 + 8 / 3),
        # weights 1/3 and 1: (2,2) / (4/3) = (1.5, 1.5)
        (8.5, 2.5 + 8 / 3),
    )


def check_server_learning_rate(optimizer=HALF_STEPS):
    """w <- w + eta_g (...) / K, with eta_g = 1/2: half of every step of check_fedbuff_history."""
    versions = run(FEDBUFF_UPDATES, aggregator=FEDBUFF, policy=INVERSE, optimizer=optimizer)

    assert_versions(versions, (0, 0), (1.5, 0.5), (3, 1.5), (3.5, 2))


COHORT = (Update("a", 0, (4.0, 8.0), num_examples=30), Update("b", 0, (8.0, -4.0), num_examples=10))


def check_fedavg(aggregator=FEDAVG):
    """The mean of the local models weighed by their examples."""
    versions = run(COHORT, aggregator=aggregator, policy=Constant(), by_examples=True)

    # 30/40 (4,8) + 10/40 (8,-4) = (3+2, 6-1)
    assert_versions(versions, (0, 0), (5, 5))


def test_fedasync_moves_towards_the_local_model_as_its_equation_says():
    check_fedasync_history()


def test_fedbuff_adds_the_staleness_weighted_sum_divided_by_the_goal():
    check_fedbuff_history()


def test_fedbuff_can_divide_by_the_staleness_weights_instead():
    check_fedbuff_normalised_history()


def test_the_server_learning_rate_scales_every_step_of_fedbuff():
    check_server_learning_rate()


def test_fedavg_averages_the_local_models_by_their_examples():
    check_fedavg()


def test_fedbuff_over_the_whole_fleet_without_staleness_is_fedavg():
    check_fedavg(FEDBUFF)
    check_fedavg(FEDBUFF_NORMALISED)


def test_fedasync_with_mixing_one_replaces_the_model_with_a_fresh_local_model():
    versions = run([Update("a", 0, (4.0, 8.0))], aggregator=FedAsync(mixing=1.0), policy=INVERSE)

    assert_versions(versions, (0, 0), (4, 8))


def test_fedasync_ignores_the_number_of_examples():
    plain = run(FEDASYNC_UPDATES, aggregator=FEDASYNC, policy=INVERSE)
    many = [
        Update(update.device, update.base_version, update.delta, num_examples=60)
        for update in FEDASYNC_UPDATES
    ]
    weighed = run(many, aggregator=FEDASYNC, policy=INVERSE, by_examples=True)

    assert_versions(weighed, *plain)


def fold_pair(aggregator, weights=(1.0, 1.0), importances=(1.0, 1.0)):
    """Fold (6, 2) and (2, 4) for a current and base model of (1, 1)."""
    buffer = empty_buffer(2)
    for numbers, weight, importance in zip(((6.0, 2.0), (2.0, 4.0)), weights, importances, strict=True):
        buffer = aggregator.fold(
            buffer,
            vector(*numbers),
            staleness_weight=weight,
            importance=importance,
            current=vector(1, 1),
            base=vector(1, 1),
        )
    return buffer


def test_a_partial_buffer_is_divided_by_what_is_in_it_not_by_the_goal():
    buffer = fold_pair(FedBuff(goal=10), weights=(1.0, 0.5))

    # ((6,2) + 1/2 (2,4)) / 2 = (7,4) / 2; by the goal it would be (0.7, 0.4)
    assert (buffer.divisor, buffer.count) == (2.0, 2)
    np.testing.assert_array_equal(FedBuff(goal=10).aggregated_delta(buffer), vector(3.5, 2))


def test_fedbuff_with_examples_divides_by_the_examples():
    buffer = fold_pair(FedBuff(goal=2), weights=(1.0, 0.5), importances=(3.0, 1.0))

    # (3 (6,2) + 1/2 * 1 (2,4)) / (3 + 1) = (19,8) / 4
    assert buffer.divisor == 4.0
    np.testing.assert_array_equal(FedBuff().aggregated_delta(buffer), vector(4.75, 2))


def test_fedbuff_normalised_with_examples_divides_by_both():
    aggregator = FedBuff(goal=2, normalise_staleness=True)
    buffer = fold_pair(aggregator, weights=(1.0, 0.5), importances=(3.0, 2.0))

    # (3 (6,2) + 1/2 * 2 (2,4)) / (3 + 1) = (20,10) / 4
    assert buffer.divisor == 4.0
    np.testing.assert_array_equal(aggregator.aggregated_delta(buffer), vector(5, 2.5))


def test_taking_the_aggregated_delta_leaves_the_buffer_as_it_was():
    buffer = fold_pair(FedBuff(goal=2))
    FedBuff(goal=2).aggregated_delta(buffer)

    np.testing.assert_array_equal(buffer.total, vector(8, 6))


@pytest.mark.parametrize("aggregator", [FedAsync(), FedBuff(), FedAvg(cohort=2)], ids=repr)
def test_an_empty_buffer_has_no_aggregated_delta(aggregator):
    with pytest.raises(ValueError, match="empty buffer"):
        aggregator.aggregated_delta(empty_buffer(2))


def test_each_aggregator_says_when_a_version_is_due_and_what_it_needs():
    assert [a.goal for a in (FedAsync(), FedBuff(), FedBuff(goal=3), FedAvg(cohort=7))] == [1, 10, 3, 7]
    assert [a.needs_base for a in (FedAsync(), FedBuff(), FedAvg(cohort=7))] == [True, False, False]
    assert [a.max_staleness for a in (FedAsync(), FedBuff(), FedAvg(cohort=7))] == [None, None, 0]


def test_fedavg_refuses_a_stale_update():
    with pytest.raises(ValueError, match=r"staleness weight 0\.5: FedAvg admits only fresh updates"):
        fold_pair(FedAvg(cohort=2), weights=(1.0, 0.5))


def test_fedasync_refuses_an_update_whose_base_is_gone():
    with pytest.raises(ValueError, match="needs the parameters of the base version"):
        FedAsync().fold(
            empty_buffer(2),
            vector(1, 1),
            staleness_weight=1.0,
            importance=1.0,
            current=vector(0, 0),
            base=None,
        )


@pytest.mark.parametrize("aggregator", [FedAsync(), FedBuff()], ids=repr)
@pytest.mark.parametrize("weight", [0.0, -0.5, 1.5, 1e-30, np.nan, np.inf])
def test_a_staleness_weight_that_no_policy_gives_is_refused(aggregator, weight):
    with pytest.raises(ValueError, match="staleness weight"):
        fold_pair(aggregator, weights=(1.0, weight))


@pytest.mark.parametrize("aggregator", [FedAsync(), FedBuff(), FedAvg(cohort=2)], ids=repr)
@pytest.mark.parametrize("importance", [0.0, -1.0, 1e-9, 1e30, np.nan, np.inf])
def test_an_importance_that_is_no_number_of_examples_is_refused(aggregator, importance):
    with pytest.raises(ValueError, match="importance"):
        fold_pair(aggregator, importances=(1.0, importance))


@pytest.mark.parametrize("aggregator", [FedAsync(), FedBuff(), FedAvg(cohort=2)], ids=repr)
@pytest.mark.parametrize(
    "delta",
    [vector(1), vector(1, 2, 3), np.ones((1, 2), np.float32), np.ones(2), np.ones(2, np.int32)],
    ids=lambda delta: f"{delta.dtype}{delta.shape}",
)
def test_a_delta_of_another_shape_or_dtype_is_refused_and_the_buffer_unchanged(aggregator, delta):
    buffer = empty_buffer(2)

    with pytest.raises(ValueError, match=r"delta is .*expected float32 of shape \(2,\)"):
        aggregator.fold(
            buffer, delta, staleness_weight=1.0, importance=1.0, current=vector(0, 0), base=vector(0, 0)
        )
    np.testing.assert_array_equal(buffer.total, vector(0, 0))


@pytest.mark.parametrize("aggregator", [FedAsync(), FedBuff(), FedAvg(cohort=2)], ids=repr)
@pytest.mark.parametrize("importance", [1.0, 3.0])
def test_folding_leaves_delta_current_and_base_as_they_were(aggregator, importance):
    delta, current, base = vector(1, 2), vector(3, 4), vector(5, 6)
    aggregator.fold(
        empty_buffer(2), delta, staleness_weight=1.0, importance=importance, current=current, base=base
    )

    assert [list(delta), list(current), list(base)] == [[1, 2], [3, 4], [5, 6]]


deltas = st.lists(st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)), min_size=1, max_size=8)


@given(numbers=deltas, shuffle=st.randoms(use_true_random=False))
def test_the_order_of_the_updates_matters_only_to_rounding(numbers, shuffle):
    shuffled = list(numbers)
    shuffle.shuffle(shuffled)
    results = []
    for order in (numbers, shuffled):
        buffer = empty_buffer(2)
        for pair in order:
            # The weight belongs to the update, here by its first number.
            weight = 1.0 / (1 + abs(pair[0]) % 7)
            buffer = FedBuff().fold(buffer, vector(*pair), staleness_weight=weight, importance=1.0)
        results.append(FedBuff().aggregated_delta(buffer))

    np.testing.assert_allclose(*results, rtol=0, atol=1e-3)


sizes = st.integers(0, 40)
seeds = st.integers(0, 2**32 - 1)


@given(size=sizes, seed=seeds, weight=st.sampled_from([1.0, 0.3]), tile=st.integers(1, 11))
def test_results_do_not_depend_on_the_tiles_and_equal_float32_done_one_by_one(size, seed, weight, tile):
    start, delta, current, base = np.random.default_rng(seed).standard_normal((4, size)).astype(np.float32)

    def total_of(aggregator):
        return aggregator.fold(
            Buffer(total=start.copy(), divisor=1.0, count=1),
            delta,
            staleness_weight=weight,
            importance=1.0,
            current=current,
            base=base,
        ).total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "TILE", tile)
        buffered, mixed = total_of(FedBuff()), total_of(FedAsync(mixing=0.6))

    # numpy's float32 scalars round after each operation, without vector instructions.
    s, alpha_s = np.float32(weight), np.float32(0.6 * weight)
    for i in range(size):
        assert buffered[i] == start[i] + s * delta[i]
        assert mixed[i] == start[i] + alpha_s * ((base[i] - current[i]) + delta[i])


def test_a_fixed_history_gives_the_same_bytes_on_every_machine():
    # Inputs by integer arithmetic, the same everywhere; a size that fills no tile and no vector register.
    size = aggregation.TILE + 13
    parameters = (np.arange(size) * 2654435761 % 1000003 / 1000003).astype(np.float32)
    optimizer, aggregator = Adam(), FedBuff(goal=4)
    state = optimizer.init(size)
    for version in range(3):
        buffer = empty_buffer(size)
        for number in range(4):
            residues = np.arange(size) * (40503 + number + 7 * version) % 999983
            delta = (residues / 999983 - 0.5).astype(np.float32)
            weight = (1.0, 0.7071067811865475, 0.5, 0.4472135954999579)[number]
            buffer = aggregator.fold(buffer, delta, staleness_weight=weight, importance=1.0)
        state, parameters = optimizer.apply(state, parameters, aggregator.aggregated_delta(buffer))

    digest = hashlib.sha256(parameters.astype("<f4").tobytes()).hexdigest()
    # Also computed apart from this code, in float64 with every single result rounded to float32.
    assert digest == "8abaa20376c022e96c85e1cb6d06f26c006c40de31b9454c0f720c1445986696"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "fedasync"}, FedAsync(mixing=0.6)),
        ({"kind": "fedbuff"}, FedBuff(goal=10, normalise_staleness=False)),
        (
            {"kind": "fedbuff", "goal": 3, "normalise_staleness": True},
            FedBuff(goal=3, normalise_staleness=True),
        ),
        ({"kind": "fedavg", "cohort": 5}, FedAvg(cohort=5)),
    ],
)
def test_settings_decode_into_the_aggregator_itself(settings, expected):
    assert msgspec.convert(settings, Aggregator) == expected


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "fedbuf"}, r"Invalid value 'fedbuf' - at `\$\.kind`"),
        ({"kind": "fedbuff", "goals": 3}, "unknown field `goals`"),
        ({"kind": "fedbuff", "goal": 0}, r">= 1 - at `\$\.goal`"),
        ({"kind": "fedbuff", "goal": 2.5}, r"got `float` - at `\$\.goal`"),
        ({"kind": "fedbuff", "normalise_staleness": 1}, r"got `int` - at `\$\.normalise_staleness`"),
        ({"kind": "fedavg"}, "missing required field `cohort`"),
        ({"kind": "fedasync", "goal": 2}, "unknown field `goal`"),
        ({"kind": "fedasync", "mixing": 0.0}, r"> 0\.0 - at `\$\.mixing`"),
        ({"kind": "fedasync", "mixing": 1.1}, r"<= 1\.0 - at `\$\.mixing`"),
        ({"kind": "fedasync", "mixing": float("nan")}, r"> 0\.0 - at `\$\.mixing`"),
    ],
)
def test_a_wrong_setting_is_an_error_that_says_where(settings, complaint):
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(settings, Aggregator)
