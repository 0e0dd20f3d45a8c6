"""The server optimizers against two steps worked out by hand, starting from parameters (1, 2)."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.server_optimizers import SGD, Adam, Momentum, OptimizerState, ServerOptimizer, Yogi

OPTIMIZERS = [SGD(), Momentum(), Adam(), Yogi()]


def vector(*numbers):
    return np.array(numbers, np.float32)


def steps(optimizer, *deltas):
    """Apply the deltas in turn to parameters (1, 2); give the state and the parameters after each."""
    state, parameters = optimizer.init(2), vector(1, 2)
    results = []
    for delta in deltas:
        state, parameters = optimizer.apply(state, parameters, vector(*delta))
        results.append((state, parameters))
    return results


def assert_close(actual, *expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_sgd_with_learning_rate_one_adds_the_delta():
    [(_, parameters)] = steps(SGD(), (0.5, -3.0))

    assert_close(parameters, 1.5, -1)  # (1, 2) + (0.5, -3)


def test_sgd_adds_the_delta_times_the_learning_rate():
    (_, first), (_, second) = steps(SGD(learning_rate=2.0), (0.5, -3.0), (1.0, 1.0))

    assert_close(first, 2, -4)  # (1, 2) + 2 (0.5, -3)
    assert_close(second, 4, -2)  # (2, -4) + 2 (1, 1)


def test_momentum_keeps_a_part_of_the_velocity():
    (_, first), (state, second) = steps(Momentum(learning_rate=2.0, momentum=0.5), (1.0, -2.0), (1.0, 1.0))

    assert_close(first, 3, -2)  # v = (1, -2); (1, 2) + 2 (1, -2)
    assert_close(second, 6, -2)  # v = 1/2 (1, -2) + (1, 1) = (1.5, 0); (3, -2) + 2 (1.5, 0)
    assert_close(state.arrays()["velocity"], 1.5, 0)


def test_momentum_zero_is_sgd():
    deltas = ((1.0, -2.0), (1.0, 1.0))
    plain = steps(SGD(learning_rate=0.3), *deltas)
    momentum = steps(Momentum(learning_rate=0.3, momentum=0.0), *deltas)

    for (_, expected), (_, actual) in zip(plain, momentum, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_adam_follows_its_equations_for_two_steps():
    adam = Adam(learning_rate=2.0, beta_1=0.5, beta_2=0.5, adaptivity=0.5)
    (state, first), (_, second) = steps(adam, (0.5, -3.5), (3.5, 2.5))

    # Start: m = (0, 0), v = 1/2^2 = (1/4, 1/4).
    # Step 1: m = 1/2 (0.5, -3.5) = (0.25, -1.75)
    #         v = 1/2 (1/4) + 1/2 (0.25, 12.25) = (0.25, 6.25); sqrt v + 1/2 = (1, 3)
    #         hence x = (1, 2) + 2 (0.25, -1.75/3)
    assert_close(state.arrays()["first_moment"], 0.25, -1.75)
    assert_close(state.arrays()["second_moment"], 0.25, 6.25)
    assert_close(first, 1.5, 2 - 3.5 / 3)
    # Step 2: m = 1/2 (0.25, -1.75) + 1/2 (3.5, 2.5) = (1.875, 0.375)
    #         v = 1/2 (0.25, 6.25) + 1/2 (12.25, 6.25) = (6.25, 6.25); sqrt v + 1/2 = (3, 3)
    #         hence x = x + 2 (0.625, 0.125)
    assert_close(second, 2.75, 2 - 3.5 / 3 + 0.25)


def test_yogi_follows_its_equations_for_two_steps():
    yogi = Yogi(learning_rate=2.0, beta_1=0.5, beta_2=0.5, adaptivity=0.5)
    (first_state, first), (second_state, second) = steps(yogi, (0.5, -2.0), (2.0, 4 / 3))

    # Start: m = (0, 0), v = 1/2^2 = (1/4, 1/4).
    # Step 1: D^2 = (1/4, 4); sign(v - D^2) = (0, -1)
    #         m = 1/2 (0.5, -2) = (0.25, -1)
    #         v = (1/4, 1/4 + 1/2 * 4) = (0.25, 2.25); sqrt v + 1/2 = (1, 2)
    #         hence x = (1, 2) + 2 (0.25, -0.5)
    assert_close(first_state.arrays()["second_moment"], 0.25, 2.25)
    assert_close(first, 1.5, 1)
    # Step 2: D^2 = (4, 16/9); sign(v - D^2) = (-1, +1)
    #         m = 1/2 (0.25, -1) + 1/2 (2, 4/3) = (1.125, 1/6)
    #         v = (1/4 + 1/2 * 4, 9/4 - 1/2 * 16/9) = (9/4, 49/36); sqrt v + 1/2 = (2, 5/3)
    #         hence x = x + 2 (0.5625, 0.1)
    assert_close(second_state.arrays()["first_moment"], 1.125, 1 / 6)
    assert_close(second_state.arrays()["second_moment"], 2.25, 49 / 36)
    assert_close(second, 2.625, 1.2)


@pytest.mark.parametrize("optimizer", [Adam(adaptivity=0.01), Yogi(adaptivity=0.01)], ids=repr)
def test_the_adaptive_optimizers_start_at_zero_and_at_the_square_of_the_adaptivity(optimizer):
    arrays = optimizer.init(2).arrays()

    np.testing.assert_array_equal(arrays["first_moment"], vector(0, 0))
    np.testing.assert_array_equal(arrays["second_moment"], vector(1e-4, 1e-4))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_zero_delta_at_the_start_changes_no_parameter(optimizer):
    [(_, parameters)] = steps(optimizer, (0.0, 0.0))

    np.testing.assert_array_equal(parameters, vector(1, 2))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_step_goes_the_way_the_delta_points(optimizer):
    [(_, parameters)] = steps(optimizer, (0.5, -0.5))

    assert parameters[0] > 1
    assert parameters[1] < 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_step_leaves_what_it_was_given_as_it_was(optimizer):
    state, _ = optimizer.apply(optimizer.init(2), vector(1, 2), vector(3, -4))
    before = [array.copy() for array in state.vectors]
    parameters, delta = vector(1, 2), vector(0.5, 5)
    _, stepped = optimizer.apply(state, parameters, delta)

    np.testing.assert_array_equal(parameters, vector(1, 2))
    np.testing.assert_array_equal(delta, vector(0.5, 5))
    for array, copy in zip(state.vectors, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert not np.shares_memory(stepped, parameters)
    assert not np.shares_memory(stepped, delta)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_everything_stays_float32(optimizer):
    state, parameters = optimizer.apply(optimizer.init(2), vector(1, 2), vector(3, -4))

    assert {array.dtype for array in (parameters, *state.vectors)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_state_saved_and_restored_continues_equal_to_the_bit(optimizer):
    state, parameters = optimizer.apply(optimizer.init(2), vector(1, 2), vector(3, -4))
    restored = optimizer.from_arrays({name: array.copy() for name, array in state.arrays().items()}, 2)
    _, expected = optimizer.apply(state, parameters, vector(0.1, 0.2))
    _, actual = optimizer.apply(restored, parameters, vector(0.1, 0.2))

    assert actual.tobytes() == expected.tobytes()


moderate = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize("kind", [Adam, Yogi])
@given(deltas=st.lists(st.tuples(moderate, moderate), min_size=1, max_size=6))
def test_the_second_moment_is_never_negative_and_the_parameters_stay_finite(kind, deltas):
    for state, parameters in steps(kind(), *deltas):
        assert np.all(state.arrays()["second_moment"] >= 0)
        assert np.all(np.isfinite(parameters))


@given(size=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_adam_on_vectors_equals_float32_done_one_by_one(size, seed):
    generator = np.random.default_rng(seed)
    parameters, delta, m, v = generator.standard_normal((4, size)).astype(np.float32)
    v = np.abs(v)
    adam = Adam()
    _, stepped = adam.apply(
        adam.from_arrays({"first_moment": m, "second_moment": v}, size), parameters, delta
    )

    # numpy's float32 scalars round after each operation, without vector instructions.
    float32 = np.float32
    for i in range(size):
        first = float32(0.9) * m[i] + float32(1.0 - 0.9) * delta[i]
        second = float32(0.99) * v[i] + float32(1.0 - 0.99) * (delta[i] * delta[i])
        assert stepped[i] == parameters[i] + first / (np.sqrt(second) + float32(1e-3)) * float32(0.01)


def test_a_state_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"state has \['velocity'\]; this optimizer keeps \['first_moment'"):
        Adam().apply(Momentum().init(2), vector(1, 2), vector(1, 1))


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({}, r"state has \[\]; this optimizer keeps \['velocity'\]"),
        ({"velocity": vector(0, 0), "second_moment": vector(0, 0)}, "second_moment"),
        (
            {"velocity": vector(0, 0, 0)},
            r"velocity is float32 of shape \(3,\); expected float32 of shape \(2,\)",
        ),
        ({"velocity": np.zeros(2)}, r"velocity is float64 of shape \(2,\)"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(arrays, complaint):
    with pytest.raises(ValueError, match=complaint):
        Momentum().from_arrays(arrays, 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize(
    "delta",
    [vector(1), vector(1, 2, 3), np.ones((1, 2), np.float32), np.ones(2)],
    ids=lambda d: f"{d.dtype}{d.shape}",
)
def test_a_delta_of_another_shape_or_dtype_is_refused(optimizer, delta):
    with pytest.raises(ValueError, match=r"delta is .*expected float32 of shape \(2,\)"):
        optimizer.apply(optimizer.init(2), vector(1, 2), delta)


def test_sgd_keeps_no_state():
    assert SGD().init(2).arrays() == {}
    assert isinstance(SGD().from_arrays({}, 2), OptimizerState)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "sgd"}, SGD(learning_rate=1.0)),
        ({"kind": "momentum"}, Momentum(learning_rate=1.0, momentum=0.9)),
        ({"kind": "adam", "learning_rate": 0.1}, Adam(learning_rate=0.1)),
        ({"kind": "yogi", "beta_2": 0.9}, Yogi(beta_2=0.9)),
    ],
)
def test_settings_decode_into_the_optimizer_itself(settings, expected):
    assert msgspec.convert(settings, ServerOptimizer) == expected


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "adma"}, r"Invalid value 'adma' - at `\$\.kind`"),
        ({"kind": "sgd", "momentum": 0.9}, "unknown field `momentum`"),
        ({"kind": "sgd", "learning_rate": 0.0}, r"> 0\.0 - at `\$\.learning_rate`"),
        ({"kind": "sgd", "learning_rate": math.nan}, r"> 0\.0 - at `\$\.learning_rate`"),
        ({"kind": "sgd", "learning_rate": math.inf}, r"<= 1000\.0 - at `\$\.learning_rate`"),
        ({"kind": "momentum", "momentum": 1.0}, r"< 1\.0 - at `\$\.momentum`"),
        ({"kind": "adam", "beta_1": -0.1}, r">= 0\.0 - at `\$\.beta_1`"),
        ({"kind": "yogi", "adaptivity": 0.0}, r"at `\$\.adaptivity`"),
    ],
)
def test_a_wrong_setting_is_an_error_that_says_where(settings, complaint):
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(settings, ServerOptimizer)
