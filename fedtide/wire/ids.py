"""Identifiers. Each has its own type, so that two strings which must not be swapped have two names."""

import re
from typing import Final, NewType

from fedtide.wire.errors import MalformedId

FleetId = NewType("FleetId", str)
DeviceId = NewType("DeviceId", str)
PlanId = NewType("PlanId", str)
"""The first 32 hexadecimal digits of the SHA-256 of the plan's manifest."""
BlobId = NewType("BlobId", str)
"""The first 32 hexadecimal digits of the SHA-256 of a blob's content."""
ModelVersion = NewType("ModelVersion", int)
"""How many aggregations made this model; the initial model is version 0."""
Counter = NewType("Counter", int)
"""A device's update number: monotone, reserved on its disk before use, never reused."""
Epoch = NewType("Epoch", int)
"""Which run of the coordinator wrote this: higher fences off lower."""

# The characters are safe in an MQTT topic level, a file name and a DNS label on every system.
_ID: Final = re.compile(r"[a-z0-9_-]{1,64}")
_ID_DIGITS: Final = 32
COORDINATOR_NAME: Final = "coordinator"
"""The coordinator's user name at the broker; no device may have it."""


def check_id(kind: str, text: str) -> str:
    """Return ``text`` if it may name a fleet or a device.

    Raises:
        MalformedId: it is not 1 to 64 characters of ``[a-z0-9_-]``.
    """
    if not _ID.fullmatch(text):
        raise MalformedId(kind, text)
    return text


def fleet_id(text: str) -> FleetId:
    """Check and brand a fleet's name."""
    return FleetId(check_id("fleet", text))


def device_id(text: str) -> DeviceId:
    """Check and brand a device's name.

    Raises:
        MalformedId: not a name, or the coordinator's own: brokers give that name the coordinator's rights.
    """
    if text == COORDINATOR_NAME:
        raise MalformedId("device", text)
    return DeviceId(check_id("device", text))


def plan_id(manifest_sha256: bytes) -> PlanId:
    """Name a plan by the SHA-256 of its manifest."""
    return PlanId(manifest_sha256.hex()[:_ID_DIGITS])


def blob_id(content_sha256: bytes) -> BlobId:
    """Name a blob by the SHA-256 of its content."""
    return BlobId(content_sha256.hex()[:_ID_DIGITS])
