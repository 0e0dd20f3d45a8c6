"""Pace: how long devices are told to spread and to rest, from what was measured."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.pace import Pace, Pacer, after_batch, at_first, is_news, jittered_s, spread_s
from coordinator.settings import Pacing

SETTINGS = Pacing(at_once=32, share=0.5, at_first_per_s=200.0, least_per_s=10.0, most_per_s=5000.0)
positive = st.floats(1e-3, 1e6)


def test_a_fleet_that_may_come_at_once_is_never_told_to_wait():
    assert spread_s(at_first(SETTINGS), 32, SETTINGS) == 0.0
    assert spread_s(at_first(SETTINGS), 0, SETTINGS) == 0.0


def test_a_larger_one_spreads_over_the_time_that_half_of_our_pace_takes():
    # (1032 - 32) devices at half of 400 updates a second
    assert spread_s(Pace(400.0), 1032, SETTINGS) == 5.0
    # before anything was measured: half of 200
    assert spread_s(at_first(SETTINGS), 1032, SETTINGS) == 10.0


def test_nobody_is_told_to_wait_longer_than_the_longest():
    assert spread_s(Pace(0.001), 100_000, SETTINGS) == 600.0


def test_the_pace_is_taken_to_be_within_its_bounds():
    assert spread_s(Pace(1.0), 82, SETTINGS) == 10.0  # 50 devices at half of the least, 10
    assert spread_s(Pace(1e6), 2532, SETTINGS) == 1.0  # 2,500 at half of the most, 5,000


def test_a_full_batch_moves_the_pace_up_and_down():
    # 256 updates weigh as much as everything before: the mean of 200 and 256 / 0.64 = 400, and of 200 and 100
    assert after_batch(Pace(200.0), 256, 0.64, more=True) == Pace(300.0)
    assert after_batch(Pace(200.0), 256, 2.56, more=True) == Pace(150.0)


def test_a_small_batch_that_nobody_waited_behind_says_only_what_is_sustained_at_least():
    assert after_batch(Pace(200.0), 1, 0.1, more=False) == Pace(200.0)  # 10 a second, but of one
    assert after_batch(Pace(200.0), 1, 0.1, more=True).updates_per_s < 200.0
    assert after_batch(Pace(200.0), 1, 0.001, more=False).updates_per_s == pytest.approx(200 + 800 / 257)


def test_a_batch_of_half_the_receive_maximum_is_full_whatever_waits_in_our_own_line():
    assert after_batch(Pace(200.0), 16, 1.0, more=False).updates_per_s < 200.0


def test_a_clock_that_stood_still_gives_no_division_by_zero():
    assert after_batch(Pace(200.0), 1, 0.0, more=False).updates_per_s > 200.0


@given(positive, st.integers(1, 1000), st.floats(1e-6, 1e3), st.booleans())
def test_the_pace_stays_between_what_it_was_and_what_was_measured(pace, updates, seconds, more):
    after = after_batch(Pace(pace), updates, seconds, more=more).updates_per_s
    low, high = sorted((pace, updates / seconds))
    assert low * (1 - 1e-9) <= after <= high * (1 + 1e-9)


@given(st.integers(0, 10**6), st.integers(0, 10**6), positive)
def test_more_devices_never_spread_over_less_time(one, other, pace):
    few, many = sorted((one, other))
    assert spread_s(Pace(pace), few, SETTINGS) <= spread_s(Pace(pace), many, SETTINGS)


@given(st.integers(33, 10**6), st.floats(10.0, 5000.0))
def test_what_is_offered_beyond_what_may_come_at_once_stays_below_what_is_sustained(devices, pace):
    settings = Pacing(longest_s=1e9)
    offered = (devices - settings.at_once) / spread_s(Pace(pace), devices, settings)
    assert offered <= pace * settings.share * (1 + 1e-9)


def test_only_a_spread_that_differs_by_a_factor_of_two_is_news():
    assert is_news(0.0, 0.1)
    assert is_news(5.0, 0.0)
    assert not is_news(0.0, 0.0)
    assert not is_news(5.0, 10.0)
    assert not is_news(10.0, 5.0)
    assert is_news(10.0, 4.9)


@given(st.binary(min_size=32, max_size=32), st.floats(0.0, 1e3))
def test_a_rest_is_half_to_one_and_a_half_times_the_mean(digest, wait_s):
    assert 0.5 * wait_s <= jittered_s(wait_s, digest) <= 1.5 * wait_s


def test_rests_of_one_batch_are_spread_evenly():
    digests = [bytes((0, 0, 0, first)) + bytes(28) for first in range(256)]
    rests = sorted(jittered_s(10.0, digest) for digest in digests)
    assert rests[0] == 5.0
    assert sum(rests) / 256 == pytest.approx(10.0, rel=0.01)
    assert max(later - sooner for sooner, later in pairwise(rests)) < 0.05


def test_who_may_come_back_is_whoever_is_enrolled_and_who_rests_is_whoever_is_there():
    """After a partition the broker calls the whole fleet offline, and then all of it is back."""
    pacer = Pacer(SETTINGS)
    assert pacer.look(enrolled=1032, online=0)
    assert pacer.spread_s == 10.0
    assert pacer.rest_s(bytes(32)) == 0.0
    assert not pacer.look(enrolled=1032, online=1032)  # nothing new for those that come back
    assert pacer.rest_s(bytes(32)) == 5.0  # half of 10, by this digest


def test_the_announced_spread_stays_until_another_one_is_news():
    pacer = Pacer(SETTINGS)
    pacer.look(enrolled=1032, online=0)
    pacer.note_batch(256, 0.64, more=True)  # 300 a second: 1000 / 150 = 6.7 s
    assert not pacer.look(enrolled=1032, online=0)
    assert pacer.spread_s == 10.0
    pacer.note_batch(256_000, 256.0, more=True)  # nearly 1000 a second
    assert pacer.look(enrolled=1032, online=0)
    assert pacer.spread_s == pytest.approx(2.0, rel=0.01)
