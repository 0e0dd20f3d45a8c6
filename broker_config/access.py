"""Who may read and write which topic, generated from the topic table: there is no second list to forget.

The user's name is the device id: a device's certificate carries it as its common name.
"""

from typing import Final

from fedtide.wire.ids import FleetId
from fedtide.wire.ids import fleet_id as checked_fleet_id
from fedtide.wire.topics import TOPICS, TopicTemplate

COORDINATOR_USER: Final = "coordinator"
"""The coordinator's user name at the broker. No device may have this id, or it would have these rights."""

# mosquitto puts the user's name here when it checks a pattern.
_USER: Final = "%u"


def mosquitto_acl(fleet: FleetId) -> str:
    """Render the text of mosquitto's ``acl_file`` for one fleet.

    A pattern holds for every user, so a device gets what the topic table allows and nothing else; the
    coordinator gets everything below the fleet. For several fleets on one broker, join their texts: every
    device may then take part in each of them.

    Raises:
        MalformedId: the fleet's name could not stand in a topic.
    """
    fleet = checked_fleet_id(fleet)
    rules = "\n".join(f"# {topic.purpose}\n{_pattern(topic, fleet)}" for topic in TOPICS)
    return f"""\
# mosquitto access rules of the fleet {fleet}. Written by broker_config.access from the topic table.
# What no line allows is denied. %u is the user's name: the common name of the device's certificate.
# mosquitto warns of the patterns without %u when it starts, and applies them all the same, to everybody.

{rules}

# The coordinator publishes what devices read and reads what they write.
user {COORDINATOR_USER}
topic readwrite fl/1/{fleet}/#
"""


def _pattern(topic: TopicTemplate, fleet: FleetId) -> str:
    return f"pattern {topic.access.value} {topic.filter(fleet, device=_USER)}"
