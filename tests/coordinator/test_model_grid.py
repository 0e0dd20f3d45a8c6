"""What devices hold follows the model on grids of powers of two, and never falls behind by a step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.model_grid import (
    DEAD_ZONE,
    difference,
    first_on_grid,
    grid_of,
    next_on_grid,
    spread_after,
    step_exponents,
)
from fedtide.wire.parameters import Schema, TensorSpec


def schema(*shapes):
    return Schema(
        tensors=tuple(
            TensorSpec(name=f"p.{place}", dtype="float32", shape=shape) for place, shape in enumerate(shapes)
        )
    )


def vector(*numbers):
    return np.array(numbers, np.float32)


MATRIX = schema((2, 2))
TWO = schema((2, 1), (2, 1))


def test_a_vector_is_whole_numbers_of_the_coarsest_power_of_two():
    grid = grid_of(vector(1.0, 2.5, -3.0, 0.0), MATRIX)
    assert (grid.values.tolist(), grid.exponents) == ([2, 5, -6, 0], (-1,))  # of 1/2
    grid = grid_of(vector(12.0, -20.0, 0.0, 0.0), TWO)
    assert (grid.values.tolist(), grid.exponents) == ([3, -5, 0, 0], (2, 20))  # of 4; of nothing


@pytest.mark.parametrize(
    "numbers",
    [
        (1.0, 2.0**-24, 0.0, 0.0),  # 25 bits apart
        (2.0**45, 0.0, 0.0, 0.0),  # 2^25 of the coarsest
        (2.0**-61, 0.0, 0.0, 0.0),  # finer than the finest
        (1.0, -0.0, 0.0, 0.0),  # integers have one zero
        (3e38, 1.0, 0.0, 0.0),
    ],
)
def test_what_integers_cannot_hold_is_on_no_grid(numbers):
    assert grid_of(vector(*numbers), MATRIX) is None


def test_a_vector_on_a_grid_has_24_bits():
    grid = grid_of(vector(2.0**24 - 1, 1.0, 0.0, 0.0), MATRIX)
    assert (grid.values.tolist(), grid.exponents) == ([2**24 - 1, 1, 0, 0], (0,))


def test_the_first_versions_step_is_a_32nd_of_each_tensors_rms():
    # rms 4: 4/32 = 1/8. 4.06 × 8 = 32.48 → 32; −4.07 × 8 = −32.56 → −33.
    # rms 3: 3/32 = 0.094, rounded down to 1/16. 3.02 × 16 = 48.32 → 48; 2.98 × 16 = 47.68 → 48.
    assert first_on_grid(vector(4.06, -4.07, 3.02, 2.98), TWO).tolist() == [4.0, -4.125, 3.0, 3.0]


def test_a_tensor_of_zeros_stays_zero_and_no_zero_is_negative():
    first = first_on_grid(vector(0.0, -0.0, 100.0, -0.1), TWO)
    assert first.tolist() == [0.0, 0.0, 100.0, 0.0]
    assert not np.signbit(first[first == 0]).any()


def test_changes_inside_the_dead_zone_wait():
    # Steps of 2: below 0.65 × 2 = 1.3 nothing happens, from 1.3 to 3.3 one step, from 3.3 to 5.3 two.
    previous = vector(0.0, 10.0, 0.0, 10.0)
    target = vector(1.29, 11.31, -1.31, 6.69)
    assert next_on_grid(previous, target, (1,), MATRIX).tolist() == [0.0, 12.0, -2.0, 6.0]
    target = vector(3.29, 13.31, -1.29, 10.0)
    assert next_on_grid(previous, target, (1,), MATRIX).tolist() == [2.0, 14.0, 0.0, 10.0]


def test_a_finer_step_refines_the_grid_and_a_coarser_one_leaves_it():
    previous = vector(1.0, 2.0, 3.0, 4.0)
    finer = next_on_grid(previous, previous + np.float32(0.25), (-2,), MATRIX)
    assert finer.tolist() == [1.25, 2.25, 3.25, 4.25]
    coarser = next_on_grid(finer, finer + np.float32(8.0), (3,), MATRIX)
    assert coarser.tolist() == [9.25, 10.25, 11.25, 12.25]


def test_a_tensor_that_outgrows_its_grid_begins_anew_without_a_delta():
    previous = vector(2.0**-10, 1.0, 0.5, 0.25)
    target = vector(2.0**20, 1.0, 0.5, 0.25)  # 2^30 times as large as the step of the grid
    following = next_on_grid(previous, target, (3,), MATRIX)
    assert following.tolist() == first_on_grid(target, MATRIX).tolist()
    assert difference(previous, following, MATRIX) is None


def test_what_is_absurdly_large_is_bounded():
    assert first_on_grid(vector(3e38, -3e38, 0.0, 0.0), MATRIX).tolist() == [2.0**42, -(2.0**42), 0.0, 0.0]


def test_what_changed_is_averaged_geometrically():
    spread = spread_after((), vector(3.0, -3.0, 0.0, 0.0), TWO)
    assert spread == (3.0, 0.0)
    # √(3 × 12) = 6; and where nothing had changed, the change itself.
    assert spread_after(spread, vector(12.0, 12.0, 5.0, 5.0), TWO) == pytest.approx((6.0, 5.0))
    # Nothing changed this time: the memory stays.
    assert spread_after((6.0, 5.0), vector(0.0, 0.0, 0.0, 0.0), TWO) == (6.0, 5.0)


def test_one_step_serves_the_model_and_biases_get_a_quarter():
    mixed = schema((2, 1), (2,))
    # rms of all: 1. 8 × 1 = 2^3; the bias 8/4 = 2^1.
    assert step_exponents((1.0, 1.0), vector(1, 1, 1, 1), 8.0, mixed) == (3, 1)
    # 5 × 1 is nearer to 4 than to 8 (log2 5 = 2.32), 6 × 1 nearer to 8 (log2 6 = 2.58).
    assert step_exponents((1.0, 1.0), vector(1, 1, 1, 1), 5.0, TWO) == (2, 2)
    assert step_exponents((1.0, 1.0), vector(1, 1, 1, 1), 6.0, TWO) == (3, 3)


def test_a_tensor_that_changes_little_is_not_starved():
    # rms of all: √((100² + 0.01²)/2) = 70.7, which alone would give steps of 8 × 70.7 ≈ 2^9.
    # The second tensor's own: 8 × 2 × 0.01 = 0.16 ≈ 2^−3 (log2 0.16 = −2.64).
    assert step_exponents((100.0, 0.01), vector(1, 1, 1, 1), 8.0, TWO) == (9, -3)


def test_no_step_is_finer_than_float32_is_there():
    # 1000 needs 10 bits, so 22 bits reach down to 2^−12.
    assert step_exponents((1e-9, 1e-9), vector(1000, 1, 1, 1), 8.0, TWO)[0] == -12


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from([1e-6, 1e-3, 1.0, 30.0]), min_size=2, max_size=2),
    versions=st.integers(2, 60),
)
def test_devices_are_never_further_behind_than_the_dead_zone_and_every_delta_is_exact(seed, sizes, versions):
    rng = np.random.default_rng(seed)
    shapes = schema((5, 4), (3,))
    scale = np.repeat(sizes, (20, 3))
    model = (scale * rng.standard_normal(23)).astype(np.float32)
    held, spread = first_on_grid(model, shapes), ()
    for _ in range(versions):
        before = model
        model = (model + scale * rng.uniform(0.001, 0.1) * rng.standard_normal(23)).astype(np.float32)
        spread = spread_after(spread, model - before, shapes)
        steps = step_exponents(spread, model, 8.0, shapes)
        following = next_on_grid(held, model, steps, shapes)
        width = np.repeat(np.exp2(steps), (20, 3))
        assert (np.abs(model.astype(np.float64) - following) <= DEAD_ZONE * width * (1 + 1e-12)).all()
        grid = difference(held, following, shapes)
        delta = (grid.values * np.repeat(np.exp2(grid.exponents), (20, 3))).astype(np.float32)
        assert (held + delta).tobytes() == following.tobytes()  # float32 addition, as on a device
        held = following
