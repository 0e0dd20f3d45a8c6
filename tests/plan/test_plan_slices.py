"""Gradients of indexing, which are zeros around the places that were read."""

import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator.plan.lowering import LOWERINGS, aten

SIZE = (3, 5, 4)
axes = st.integers(-3, 2)
places = st.integers(-7, 7) | st.just(sys.maxsize)


@given(axis=axes, data=st.data())
def test_the_gradient_of_a_selected_place_is_that_of_torch(axis, data):
    index = data.draw(st.integers(-SIZE[axis], SIZE[axis] - 1))
    gradient = torch.randn_like(torch.zeros(SIZE).select(axis, index))
    found = LOWERINGS[aten.select_backward.default](gradient, SIZE, axis, index)
    assert torch.equal(found, aten.select_backward(gradient, SIZE, axis, index))


@given(axis=axes, start=places, end=places, step=st.integers(1, 3))
def test_the_gradient_of_a_slice_is_that_of_torch(axis, start, end, step):
    gradient = torch.randn_like(aten.slice(torch.zeros(SIZE), axis, start, end, step))
    found = LOWERINGS[aten.slice_backward.default](gradient, SIZE, axis, start, end, step)
    assert torch.equal(found, aten.slice_backward(gradient, SIZE, axis, start, end, step))
