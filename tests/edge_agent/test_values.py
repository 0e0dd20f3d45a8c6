import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.values import MISSING, NOT_A_NUMBER, NOT_FINITE, BadValue, number_of


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (True, 1.0),
        (-2.5, -2.5),
        (" 21.5 ", 21.5),
        ("1e3", 1000.0),
        ("ON", 1.0),
        ("off", 0.0),
        ("True", 1.0),
        ("false", 0.0),
    ],
)
def test_numbers_bools_and_texts_that_say_one_are_numbers(value: Any, number: float) -> None:
    assert number_of(value) == number


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", MISSING),
        ("  ", MISSING),
        (None, MISSING),
        ("two", NOT_A_NUMBER),
        ("21.5 °C", NOT_A_NUMBER),
        ("1_000", NOT_A_NUMBER),
        ("0x10", NOT_A_NUMBER),
        ([1], NOT_A_NUMBER),
        ({"a": 1}, NOT_A_NUMBER),
        ("nan", NOT_FINITE),
        (math.nan, NOT_FINITE),
        ("-inf", NOT_FINITE),
        ("1e999", NOT_FINITE),
        (1e39, NOT_FINITE),
        (10**400, NOT_FINITE),
    ],
)
def test_anything_else_is_bad_for_a_reason(value: Any, reason: str) -> None:
    with pytest.raises(BadValue) as bad:
        number_of(value)
    assert bad.value.reason == reason


def test_a_long_value_is_shown_shortened() -> None:
    with pytest.raises(BadValue) as bad:
        number_of("x" * 10_000)
    assert len(str(bad.value)) < 100


@given(value=st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.lists(st.integers())))
def test_a_number_is_finite_in_float32_or_refused(value: Any) -> None:
    try:
        number = number_of(value)
    except BadValue:
        return
    assert abs(number) <= 3.4028235e38
