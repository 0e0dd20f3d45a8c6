"""Messages as ordinary sensors publish them, without a broker: values, rows, windows, and all that is bad."""

from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.readings import (
    MAX_PAYLOAD_BYTES,
    NO_FIELD,
    NO_JSON,
    TOO_LARGE,
    TOO_MANY_TOPICS,
    Channel,
    Sampler,
    Sampling,
    matches,
    topic_filters,
)
from edge_agent.values import MISSING, NOT_A_NUMBER, NOT_FINITE, BadValue

ZIGBEE2MQTT: Final = (
    b'{"battery":97,"humidity":51.2,"linkquality":102,"temperature":21.46,"voltage":2995,"occupancy":true,'
    b'"update":{"installed_version":16777248,"state":"idle"}}'
)
TASMOTA: Final = (
    b'{"Time":"2024-01-05T10:00:00","ENERGY":{"Power":12,"Factor":[0.5,0.25],"Voltage":230},"TempUnit":"C"}'
)


@pytest.mark.parametrize(
    ("field", "payload", "value"),
    [
        ("temperature", ZIGBEE2MQTT, 21.46),
        ("occupancy", ZIGBEE2MQTT, 1.0),
        ("update.installed_version", ZIGBEE2MQTT, 16777248.0),
        ("ENERGY.Power", TASMOTA, 12.0),
        ("ENERGY.Factor.1", TASMOTA, 0.25),
        ("POWER", b'{"POWER":"ON"}', 1.0),
        ("0", b"[7]", 7.0),
        (None, b"21.5", 21.5),
        (None, b" -3e2\n", -300.0),
        (None, b"off", 0.0),
        (None, b'"21.5"', 21.5),
    ],
)
def test_a_channel_finds_its_value(field: str | None, payload: bytes, value: float) -> None:
    assert Channel(topic="t", field=field).read(payload) == value


@pytest.mark.parametrize(
    ("field", "payload", "reason"),
    [
        ("temperature", b"", NO_JSON),
        ("temperature", b'{"temperature":', NO_JSON),
        ("temperature", b'{"temperature":NaN}', NO_JSON),
        ("temperature", b"\xff\xfe", NO_JSON),
        ("temperature", b'{"temperature":"\xff"}', NO_JSON),
        ("temperature", b"[" * 50_000, NO_JSON),
        ("temperature", b'{"humidity":5}', NO_FIELD),
        ("temperature", b"21.5", NO_FIELD),
        ("ENERGY.Power.Now", TASMOTA, NO_FIELD),
        ("ENERGY.Factor.2", TASMOTA, NO_FIELD),
        ("ENERGY.Factor.-1", TASMOTA, NO_FIELD),
        ("ENERGY.Factor.\u00b2", TASMOTA, NO_FIELD),
        ("temperature", b'{"temperature":null}', MISSING),
        ("temperature", b'{"temperature":{"celsius":5}}', NOT_A_NUMBER),
        ("temperature", b'{"temperature":"unavailable"}', NOT_A_NUMBER),
        ("temperature", b'{"temperature":1e39}', NOT_FINITE),
        ("temperature", b'{"temperature":"NaN"}', NOT_FINITE),
        (None, b"", MISSING),
        (None, b"unavailable", NOT_A_NUMBER),
        (None, b"nan", NOT_FINITE),
        (None, b"\xff", NOT_A_NUMBER),
        (None, ZIGBEE2MQTT, NOT_A_NUMBER),
        (None, b"1" * (MAX_PAYLOAD_BYTES + 1), TOO_LARGE),
        ("a", b" " * (MAX_PAYLOAD_BYTES + 1), TOO_LARGE),
    ],
)
def test_a_payload_without_the_value_is_bad_for_a_reason(
    field: str | None, payload: bytes, reason: str
) -> None:
    with pytest.raises(BadValue) as bad:
        Channel(topic="t", field=field).read(payload)
    assert bad.value.reason == reason
    assert len(str(bad.value)) < 250


@given(payload=st.binary(max_size=60), field=st.sampled_from([None, "a", "a.0", "0.a"]))
def test_no_payload_does_worse_than_a_bad_value(payload: bytes, field: str | None) -> None:
    try:
        value = Channel(topic="t", field=field).read(payload)
    except BadValue:
        return
    assert np.isfinite(np.float32(value))


@pytest.mark.parametrize(
    ("topic_filter", "topic", "answer"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b", "a", False),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/+", "a", False),
        ("+/b", "a/b", True),
        ("+", "/a", False),
        ("/+", "/a", True),
        ("a/+/c", "a//c", True),
        ("#", "a/b", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),  # the parent level, MQTT 5 section 4.7.1.2
        ("a/#", "b", False),
        ("#", "$SYS/load", False),  # MQTT 5 section 4.7.2
        ("+/load", "$SYS/load", False),
        ("$SYS/#", "$SYS/load", True),
    ],
)
def test_topics_match_filters_as_in_mqtt(topic_filter: str, topic: str, *, answer: bool) -> None:
    assert matches(topic_filter, topic) is answer


@pytest.mark.parametrize("topic", ["", "a/#/b", "a#", "a+/b", "a/b\0"])
def test_a_topic_that_is_no_filter_is_refused(topic: str) -> None:
    with pytest.raises(ValueError, match="is no topic filter"):
        Channel(topic=topic)


@pytest.mark.parametrize("field", ["", ".", "a.", ".a", "a..b"])
def test_a_field_with_an_empty_name_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="empty name"):
        Channel(topic="t", field=field)


def test_each_filter_is_subscribed_to_once() -> None:
    channels = [Channel(topic=topic) for topic in ("b", "a", "b")]
    assert topic_filters(channels) == ["b", "a"]


# Every message is a row.

METER: Final = (Channel(topic="plugs/+", field="ENERGY.Power"), Channel(topic="plugs/+", field="on"))


def by_message(stride: int = 2, stale_s: float = 100.0) -> Sampler:
    return Sampler(Sampling(METER, window=2, stride=stride, every_s=None, stale_s=stale_s))


def meter(power: float, on: str = "true") -> bytes:
    return b'{"ENERGY":{"Power":%g},"on":%s}' % (power, on.encode())


def test_messages_become_rows_and_rows_become_windows() -> None:
    sampler = by_message(stride=1)
    assert sampler.take("plugs/a", meter(1), 0.0) == []
    [window] = sampler.take("plugs/a", meter(2, "false"), 1.0)
    assert window.tolist() == [[1, 1], [2, 0]]
    [window] = sampler.take("plugs/a", meter(3), 2.0)
    assert window.tolist() == [[2, 0], [3, 1]]
    assert sampler.bad.skipped == ()
    assert sampler.tick(3.0) == []
    assert sampler.next_row(3.0) == float("inf")


def test_a_window_holds_rows_of_one_topic_only() -> None:
    sampler = by_message()
    assert sampler.take("plugs/a", meter(1), 0.0) == []
    assert sampler.take("plugs/b", meter(2), 0.0) == []
    [window] = sampler.take("plugs/a", meter(3), 0.0)
    assert window.tolist() == [[1, 1], [3, 1]]


def test_a_bad_message_is_counted_and_breaks_the_window() -> None:
    sampler = by_message()
    sampler.take("plugs/a", meter(1), 0.0)
    assert sampler.take("plugs/a", b'{"ENERGY":{"Power":5}}', 1.0) == []
    assert sampler.take("plugs/a", meter(2), 2.0) == []
    [window] = sampler.take("plugs/a", meter(3), 3.0)
    assert window.tolist() == [[2, 1], [3, 1]]
    [skip] = sampler.bad.skipped
    assert (skip.reason, skip.count) == (NO_FIELD, 1)
    assert skip.first == "plugs/a on: there is no 'on'"


def test_a_gap_between_messages_breaks_the_window() -> None:
    sampler = by_message(stale_s=10.0)
    sampler.take("plugs/a", meter(1), 0.0)
    assert sampler.take("plugs/a", meter(2), 10.5) == []
    assert len(sampler.take("plugs/a", meter(3), 20.5)) == 1


def test_what_the_broker_kept_is_no_new_row() -> None:
    sampler = by_message()
    assert sampler.take("plugs/a", meter(1), 0.0, retained=True) == []
    assert sampler.take("plugs/a", meter(2), 0.0) == []
    assert len(sampler.take("plugs/a", meter(3), 0.0)) == 1


def test_topics_that_nobody_asked_for_are_ignored() -> None:
    sampler = by_message()
    for _ in range(4):
        assert sampler.take("lamps/a", meter(1), 0.0) == []
    assert sampler.bad.skipped == ()


def test_windows_are_cut_from_so_many_topics_and_no_more() -> None:
    sampler = by_message()
    for index in range(1000):
        sampler.take(f"plugs/{index}", meter(1), 0.0)
    [skip] = sampler.bad.skipped
    assert (skip.reason, skip.count) == (TOO_MANY_TOPICS, 1000 - 256)
    assert len(sampler.take("plugs/255", meter(2), 1.0)) == 1


def test_a_topic_that_has_fallen_silent_gives_way_to_another() -> None:
    sampler = by_message(stale_s=100.0)
    for index in range(256):
        sampler.take(f"plugs/{index}", meter(1), 0.0 if index < 10 else 50.0)
    sampler.take("plugs/new", meter(1), 120.0)
    assert sampler.bad.skipped == ()
    assert len(sampler.take("plugs/new", meter(2), 121.0)) == 1
    assert len(sampler.take("plugs/255", meter(2), 122.0)) == 1


# Sample and hold.

ROOM: Final = (Channel(topic="home/temperature"), Channel(topic="zigbee2mqtt/window", field="contact"))


def held(window: int = 2, every_s: float = 10.0, stale_s: float = 60.0) -> Sampler:
    return Sampler(Sampling(ROOM, window=window, stride=window, every_s=every_s, stale_s=stale_s))


def test_rows_are_the_latest_values_at_a_fixed_pace() -> None:
    sampler = held(window=3)
    sampler.take("home/temperature", b"20", 0.0)
    sampler.take("zigbee2mqtt/window", b'{"contact":true}', 0.0)
    assert sampler.tick(0.0) == []  # row 20, 1
    sampler.take("home/temperature", b"21", 4.0)
    sampler.take("home/temperature", b"22", 8.0)
    assert sampler.tick(9.9) == []  # not due
    assert sampler.tick(10.0) == []  # row 22, 1
    sampler.take("zigbee2mqtt/window", b'{"contact":false}', 12.0)
    [window] = sampler.tick(20.0)
    assert window.tolist() == [[20, 1], [22, 1], [22, 0]]


def test_there_is_no_row_until_every_channel_was_heard() -> None:
    sampler = held(window=1)
    sampler.take("home/temperature", b"20", 0.0)
    assert sampler.tick(0.0) == []
    sampler.take("zigbee2mqtt/window", b'{"contact":1}', 5.0)
    assert len(sampler.tick(10.0)) == 1


def test_a_value_that_has_become_stale_breaks_the_window() -> None:
    sampler = held(window=2, stale_s=25.0)
    sampler.take("zigbee2mqtt/window", b'{"contact":1}', 0.0)
    sampler.take("home/temperature", b"20", 0.0)
    assert [len(sampler.tick(now)) for now in (0.0, 10.0, 20.0, 30.0)] == [0, 1, 0, 0]
    sampler.take("zigbee2mqtt/window", b'{"contact":0}', 31.0)
    sampler.take("home/temperature", b"22", 31.0)
    assert sampler.tick(40.0) == []
    [window] = sampler.tick(50.0)
    assert window.tolist() == [[22, 0], [22, 0]]


def test_a_bad_payload_leaves_the_value_as_it_was() -> None:
    sampler = held(window=1)
    sampler.take("zigbee2mqtt/window", b'{"contact":1}', 0.0)
    sampler.take("home/temperature", b"20", 0.0)
    sampler.take("home/temperature", b"unavailable", 1.0)
    [window] = sampler.tick(2.0)
    assert window.tolist() == [[20, 1]]
    [skip] = sampler.bad.skipped
    assert skip.first == "home/temperature: 'unavailable' is not a number"


def test_what_the_broker_kept_is_a_first_value_and_never_news() -> None:
    sampler = held(window=1, stale_s=15.0)
    sampler.take("zigbee2mqtt/window", b'{"contact":1}', 0.0, retained=True)
    sampler.take("home/temperature", b"20", 0.0, retained=True)
    assert len(sampler.tick(0.0)) == 1
    sampler.take("zigbee2mqtt/window", b'{"contact":1}', 14.0)
    sampler.take("home/temperature", b"20", 14.0, retained=True)  # after a reconnect
    assert len(sampler.tick(10.0)) == 1
    assert sampler.tick(20.0) == []


def test_rows_that_are_a_little_late_are_made_up_for() -> None:
    sampler = held(window=1)
    sampler.take("zigbee2mqtt/window", b'{"contact":1}', 0.0)
    sampler.take("home/temperature", b"20", 0.0)
    assert len(sampler.tick(0.0)) == 1
    assert len(sampler.tick(35.0)) == 3  # due at 10, 20 and 30
    assert sampler.next_row(35.0) == 5.0


def test_after_a_long_absence_a_window_begins_anew() -> None:
    sampler = held(window=2, stale_s=1e6)
    sampler.take("zigbee2mqtt/window", b'{"contact":1}', 0.0)
    sampler.take("home/temperature", b"20", 0.0)
    sampler.tick(0.0)
    assert sampler.tick(10.0 + 101.0) == []  # eleven rows late: one row, of a new window
    assert len(sampler.tick(121.0)) == 1


@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 100),
            st.sampled_from(["home/temperature", "zigbee2mqtt/window", "other"]),
            st.sampled_from([b"1", b"x", b'{"contact":1}', b"{}", b"1e99"]),
        ),
        max_size=60,
    )
)
def test_windows_are_finite_and_of_one_shape_whatever_arrives(steps: list[tuple[float, str, bytes]]) -> None:
    sampler, now, messages = held(window=3), 0.0, 0
    for wait_s, topic, payload in steps:
        now += wait_s
        windows = [*sampler.take(topic, payload, now), *sampler.tick(now)]
        messages += topic != "other"
        for window in windows:
            assert window.shape == (3, 2)
            assert window.dtype == np.float32
            assert np.isfinite(window).all()
        assert 0.0 <= sampler.next_row(now) <= 10.001
    assert sum(skip.count for skip in sampler.bad.skipped) <= messages
