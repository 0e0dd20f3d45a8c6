import doctest
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.wire import topics
from fedtide.wire.ids import DeviceId, FleetId
from fedtide.wire.topics import (
    BLOB_CHUNK,
    COORDINATOR,
    DOWN,
    EVENT,
    HEAD,
    PRESENCE,
    TOPICS,
    UPDATE,
    Access,
    TopicTemplate,
    shard_of,
)

FIELDS: dict[str, str | int] = {"shard": 3, "device": "pump-7", "blob": "0a1b", "index": 12}
NAMES = {
    COORDINATOR: "fl/1/pumps/coord",
    HEAD: "fl/1/pumps/model/head",
    BLOB_CHUNK: "fl/1/pumps/model/b/0a1b/12",
    UPDATE: "fl/1/pumps/up/3/pump-7",
    DOWN: "fl/1/pumps/dn/pump-7",
    PRESENCE: "fl/1/pumps/st/pump-7",
    EVENT: "fl/1/pumps/ev/pump-7",
}
FILTERS = {
    COORDINATOR: "fl/1/pumps/coord",
    HEAD: "fl/1/pumps/model/head",
    BLOB_CHUNK: "fl/1/pumps/model/b/+/+",
    UPDATE: "fl/1/pumps/up/+/+",
    DOWN: "fl/1/pumps/dn/+",
    PRESENCE: "fl/1/pumps/st/+",
    EVENT: "fl/1/pumps/ev/+",
}

every_topic = pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.template)
ids = st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True)


def fields_of(topic: TopicTemplate) -> dict[str, str | int]:
    return {name: value for name, value in FIELDS.items() if f"{{{name}}}" in topic.template}


@every_topic
def test_a_topics_name_and_filter_are_as_documented(topic: TopicTemplate) -> None:
    assert topic.name(FleetId("pumps"), **fields_of(topic)) == NAMES[topic]
    assert topic.filter(FleetId("pumps")) == FILTERS[topic]


@every_topic
def test_a_filter_with_every_value_is_the_name(topic: TopicTemplate) -> None:
    assert topic.filter(FleetId("pumps"), **fields_of(topic)) == NAMES[topic]


@every_topic
def test_only_its_own_template_parses_a_name(topic: TopicTemplate) -> None:
    fields = {"fleet": "pumps"} | {name: str(value) for name, value in fields_of(topic).items()}
    assert topic.parse(NAMES[topic]) == fields
    assert [other for other in TOPICS if other.parse(NAMES[topic]) is not None] == [topic]


@given(fleet=ids, device=ids, shard=st.integers(0, 99))
def test_any_ids_come_back_from_a_name(fleet: str, device: str, shard: int) -> None:
    name = UPDATE.name(FleetId(fleet), shard=shard, device=device)
    assert UPDATE.parse(name) == {"fleet": fleet, "shard": str(shard), "device": device}


@every_topic
def test_topics_have_at_most_seven_levels(topic: TopicTemplate) -> None:
    assert len(NAMES[topic].split("/")) <= 7


@every_topic
def test_a_topic_with_the_longest_ids_fits_aws_iot_core(topic: TopicTemplate) -> None:
    longest = topic.name(FleetId("f" * 64), **dict.fromkeys(FIELDS, "d" * 64))
    assert len(longest) <= 256


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fl/1/pumps/dn",
        "fl/1/pumps/dn/",
        "fl/1/pumps/dn/+",
        "fl/1/pumps/dn/#",
        "fl/1/pumps/dn/Pump",
        "fl/1/pumps/dn/pump-7/more",
        "fl/1/pumps/dn/pump-7\n",
        "fl/1/pumps/dn/" + "a" * 65,
        "fl/2/pumps/dn/pump-7",
        "/fl/1/pumps/dn/pump-7",
        "fl/1//dn/pump-7",
        "fl/1/pu/mps/dn/pump-7",
    ],
)
def test_names_that_are_not_ours_are_not_parsed(name: str) -> None:
    assert DOWN.parse(name) is None


def test_devices_write_only_what_is_theirs() -> None:
    written = {topic for topic in TOPICS if topic.access is Access.WRITE}
    assert written == {UPDATE, PRESENCE, EVENT}
    assert all(topic.template.endswith("{device}") for topic in written)


def test_what_a_new_device_must_find_is_retained_and_only_metrics_and_receipts_may_be_lost() -> None:
    assert {topic for topic in TOPICS if topic.retained} == {COORDINATOR, HEAD, BLOB_CHUNK, PRESENCE}
    assert {topic for topic in TOPICS if topic.qos == 0} == {EVENT, DOWN}


def test_a_devices_shard_is_the_crc32_of_its_id_modulo_the_number_of_shards() -> None:
    # CRC-32 of "123456789" is 0xCBF43926, the check value of the algorithm; 0xCBF43926 = 7 * 488825751 + 5.
    assert shard_of(DeviceId("123456789"), 7) == 5
    assert shard_of(DeviceId("pump-7"), 1) == 0
    assert {shard_of(DeviceId(f"pump-{number}"), 4) for number in range(100)} == {0, 1, 2, 3}
    assert shard_of(DeviceId("pump-7"), 1000) == zlib.crc32(b"pump-7") % 1000


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(topics)
    assert result.attempted >= 3
    assert result.failed == 0
