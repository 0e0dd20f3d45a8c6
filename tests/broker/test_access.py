"""The access rules say exactly what the topic table says."""

import pytest

from broker_config.access import mosquitto_acl
from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import FleetId, fleet_id
from fedtide.wire.topics import TOPICS


def rules(fleet):
    lines = mosquitto_acl(fleet_id(fleet)).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_rules_of_the_fleet_pumps_are_these():
    assert rules("pumps") == [
        "pattern read fl/1/pumps/coord",
        "pattern read fl/1/pumps/model/head",
        "pattern read fl/1/pumps/model/b/+/+",
        "pattern write fl/1/pumps/up/+/%u",
        "pattern read fl/1/pumps/dn/%u",
        "pattern write fl/1/pumps/st/%u",
        "pattern write fl/1/pumps/ev/%u",
        "user coordinator",
        "topic readwrite fl/1/pumps/#",
    ]


def test_every_topic_of_the_table_has_one_rule():
    # One line per topic, then the coordinator's two.
    assert len(rules("pumps")) == len(TOPICS) + 2


def test_a_topic_with_a_device_in_it_belongs_to_that_device_alone():
    for topic, rule in zip(TOPICS, rules("pumps"), strict=False):
        assert ("{device}" in topic.template) == rule.endswith("/%u")


def test_a_fleets_rules_name_no_other_fleet():
    assert "pumps" not in mosquitto_acl(fleet_id("fans"))


@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "pumps\ntopic #", "Pumps"])
def test_a_fleet_name_that_could_widen_a_rule_is_refused(name):
    with pytest.raises(MalformedId):
        mosquitto_acl(FleetId(name))
