"""Shares: a device that never stops is dropped, and nobody else notices."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.settings import Share
from coordinator.shares import Bucket, Shares, taken
from fedtide.wire.ids import DeviceId

SETTINGS = Share(messages_per_s=50.0, burst_messages=2000)
PUMP, VALVE = DeviceId("pump-7"), DeviceId("valve-1")


def allowed(shares, device, moments):
    return sum(shares.take(device, moment) for moment in moments)


def test_after_a_pause_a_whole_burst_is_read_and_the_next_message_is_not():
    shares = Shares(SETTINGS, 60.0)
    assert allowed(shares, PUMP, [0.0] * 2000) == 2000
    assert not shares.take(PUMP, 0.0)


def test_a_flood_of_a_thousand_a_second_gets_its_burst_and_then_its_rate():
    shares = Shares(SETTINGS, 60.0)
    minute = [index / 1000 for index in range(60_000)]
    # 2,000 at once, and 50 a second for the minute that passes
    assert abs(allowed(shares, PUMP, minute) - (2000 + 60 * 50)) <= 1


def test_an_agent_that_sends_twenty_updates_a_second_is_never_dropped():
    shares = Shares(SETTINGS, 60.0)
    hour = [index / 20 for index in range(20 * 3600)]
    assert allowed(shares, PUMP, hour) == len(hour)


def test_an_update_of_64_mib_in_chunks_of_60_kb_is_read_whole_and_again_a_minute_later():
    shares = Shares(SETTINGS, 60.0)
    chunks = -(-(64 << 20) // 60_000)
    assert allowed(shares, PUMP, [0.0] * chunks) == chunks == 1119
    assert allowed(shares, PUMP, [60.0] * chunks) == chunks


def test_a_flood_takes_nothing_from_another_device():
    shares = Shares(SETTINGS, 60.0)
    allowed(shares, PUMP, [0.0] * 10_000)
    assert allowed(shares, VALVE, [0.0] * 100) == 100


def test_all_who_are_not_enrolled_share_one_bucket():
    shares = Shares(SETTINGS, 60.0)
    assert allowed(shares, None, [0.0] * 3000) == 2000
    assert len(shares) == 1


def test_who_is_over_its_share_is_told_once_a_minute_and_strangers_never():
    shares = Shares(SETTINGS, 60.0)
    told = [moment for moment in range(0, 150, 10) if shares.answers(PUMP, float(moment))]
    assert told == [0, 60, 120]
    assert not shares.answers(None, 0.0)


def test_a_device_that_is_not_heard_of_any_more_costs_no_memory():
    shares = Shares(SETTINGS, 60.0)
    for number in range(1000):
        shares.take(DeviceId(f"pump-{number}"), 0.0)
    shares.take(VALVE, 30.0)
    shares.forget_idle(40.0)  # an empty bucket is full again after 2000 / 50 seconds
    assert len(shares) == 1


def test_forgetting_gives_nobody_more_than_a_full_bucket():
    shares = Shares(SETTINGS, 60.0)
    allowed(shares, PUMP, [0.0] * 5000)
    shares.forget_idle(39.0)
    # 39 seconds gave back 1,950
    assert allowed(shares, PUMP, [39.0] * 5000) == 1950


@given(st.lists(st.floats(0.0, 100.0), max_size=200), st.integers(1, 20), st.floats(0.1, 10.0))
def test_in_any_time_no_more_are_read_than_the_burst_and_the_rate_allow(gaps, burst, rate):
    settings = Share(messages_per_s=rate, burst_messages=burst)
    bucket, now, read = None, 0.0, 0
    for gap in gaps:
        now += gap
        bucket, may = taken(bucket, now, settings)
        read += may
        assert -1e-9 <= bucket.tokens <= burst
    assert read <= burst + now * rate + 1e-6


def test_an_empty_bucket_keeps_what_has_dropped_into_it():
    # 0.25 tokens, then 0.015 s at 50 a second: 1.0
    bucket, may = taken(Bucket(0.25, 10.0), 10.015, SETTINGS)
    assert may
    assert abs(bucket.tokens) < 1e-9
