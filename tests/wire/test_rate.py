import math

import pytest

from fedtide.wire.codecs.rate import COARSEST_STEP, FINEST_STEP, Rate, rate_of


def test_without_a_word_the_codec_chooses() -> None:
    assert rate_of("lowrank", {}, adjustable=True) == Rate()
    assert Rate().budget_bytes(1000) is None


def test_a_step_sets_no_size() -> None:
    rate = rate_of("lowrank", {"step": 8.0}, adjustable=True)
    assert (rate.step, rate.budget_bytes(1000)) == (8.0, None)


def test_bits_per_parameter_become_whole_bytes_of_the_payload() -> None:
    # 0.09 bit x 100,000 parameters = 9,000 bits = 1,125 bytes.
    assert rate_of("ecsq", {"bits_per_parameter": 0.09}, adjustable=True).budget_bytes(100_000) == 1125


def test_bytes_per_update_do_not_depend_on_the_model() -> None:
    assert Rate(bytes_per_update=500.0).budget_bytes(10) == Rate(bytes_per_update=500.0).budget_bytes(10**6)


def test_two_rates_at_once_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="step and bytes_per_update are given; a rate is one of them"):
        Rate(step=8.0, bytes_per_update=500.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["step", "bits_per_parameter", "bytes_per_update"])
def test_a_rate_is_a_positive_number(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = "):
        Rate(**{name: value})


@pytest.mark.parametrize("step", [FINEST_STEP / 2, COARSEST_STEP * 2])
def test_a_step_out_of_range_is_refused_with_the_range(step: float) -> None:
    with pytest.raises(ValueError, match=r"from 0\.000976562 to 64"):
        Rate(step=step)


def test_an_unknown_parameter_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="codec lowrank has no parameter 'steps'; it has: step, bits_per_"):
        rate_of("lowrank", {"steps": 8.0}, adjustable=True)


def test_a_codec_without_a_rate_takes_no_parameter() -> None:
    assert rate_of("q8", {}, adjustable=False) == Rate()
    with pytest.raises(ValueError, match="codec q8 has no parameter 'step'; it has: none"):
        rate_of("q8", {"step": 8.0}, adjustable=False)
