"""The topic table. Each topic is written once: its name, filter, parser and access rule have one source.

Root ``fl/1/{fleet}/``, at most seven levels in all (AWS IoT Core allows seven slashes).
"""

import re
import zlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from fedtide.wire.ids import DeviceId, FleetId


class Access(StrEnum):
    """What a device may do with a topic. The coordinator may do everything below its fleet."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True)
class TopicTemplate:
    """A topic with ``{fields}`` that are values in a topic name and ``+`` in a topic filter.

    Attributes:
        template: the levels below the root, for example ``up/{shard}/{device}``.
        access: what devices may do with it.
        retained: whether the broker keeps the last message.
        qos: at most once (0) or at least once (1).
        purpose: one sentence for people who read the generated access rules.
    """

    template: str
    access: Access
    retained: bool
    qos: int
    purpose: str
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        levels = re.escape(self.full).replace(r"\{", "{").replace(r"\}", "}")
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[a-z0-9_-]{1,64})", levels)
        object.__setattr__(self, "_pattern", re.compile(pattern))

    @property
    def full(self) -> str:
        """The template from the root on."""
        return f"fl/1/{{fleet}}/{self.template}"

    def name(self, fleet: FleetId, **values: str | int) -> str:
        """The topic name to publish on: every field filled in.

        >>> UPDATE.name(FleetId("pumps"), shard=0, device="pump-7")
        'fl/1/pumps/up/0/pump-7'
        """
        return self.full.format(fleet=fleet, **values)

    def filter(self, fleet: FleetId, **values: str | int) -> str:
        """The topic filter to subscribe to: fields without a value match any one level.

        >>> UPDATE.filter(FleetId("pumps"), shard=0)
        'fl/1/pumps/up/0/+'
        """
        known = {"fleet": fleet, **{key: str(value) for key, value in values.items()}}
        return re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], "+"), self.full)

    def parse(self, topic: str) -> dict[str, str] | None:
        """The fields of a topic name, or None if it is not one of this template's.

        >>> UPDATE.parse("fl/1/pumps/up/0/pump-7")
        {'fleet': 'pumps', 'shard': '0', 'device': 'pump-7'}
        """
        match = self._pattern.fullmatch(topic)
        return match.groupdict() if match else None


COORDINATOR: Final = TopicTemplate(
    "coord", Access.READ, retained=True, qos=1, purpose="the coordinator's state and its will"
)
HEAD: Final = TopicTemplate("model/head", Access.READ, retained=True, qos=1, purpose="the signed head")
BLOB_CHUNK: Final = TopicTemplate(
    "model/b/{blob}/{index}", Access.READ, retained=True, qos=1, purpose="chunks of plans and models"
)
UPDATE: Final = TopicTemplate(
    "up/{shard}/{device}", Access.WRITE, retained=False, qos=1, purpose="chunks of a device's update"
)
DOWN: Final = TopicTemplate(
    "dn/{device}", Access.READ, retained=False, qos=0, purpose="receipts and requests to one device"
)
"""At most once: a device whose receipt is lost sends its update again, and gets another. The coordinator must
never wait for a broker's acknowledgement here, which comes behind everything that is queued for it."""
PRESENCE: Final = TopicTemplate(
    "st/{device}", Access.WRITE, retained=True, qos=1, purpose="a device's presence and its will"
)
EVENT: Final = TopicTemplate("ev/{device}", Access.WRITE, retained=False, qos=0, purpose="training metrics")

TOPICS: Final = (COORDINATOR, HEAD, BLOB_CHUNK, UPDATE, DOWN, PRESENCE, EVENT)


def shard_of(device: DeviceId, shards: int) -> int:
    """The ingest shard of a device: crc32 of its id modulo the number of shards the coordinator announced."""
    return zlib.crc32(device.encode()) % shards
