"""What is true of every message, driven by one list; and the bytes of each, which never change.

The files in ``tests/golden/messages`` were written once. Devices in the field send such bytes and journals
hold them: a test that fails here is a change of the protocol, not a file to be written again.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import msgpack
import msgspec
import pytest
from wire_samples import (
    COORDINATOR_KEY,
    DEVICE_KEY,
    EVALUATION,
    EVENT,
    HEAD,
    HEADER,
    MESSAGES,
    MISSING,
    PAYLOAD,
    RECEIPT,
    RESYNC,
    STATE,
    TROUBLE,
    sample_plan,
)

from fedtide.wire import frame
from fedtide.wire.envelope import open_update, seal_update
from fedtide.wire.errors import FrameTooLarge, MalformedFrame, UnsupportedVersion
from fedtide.wire.frame import Message
from fedtide.wire.messages import DeviceEvent, DownMessage, Head
from fedtide.wire.plan import open_plan
from fedtide.wire.seal import seal, unseal, unseal_any
from fedtide.wire.signatures import COORDINATOR_DOMAIN, DOWN_DOMAIN, HEAD_DOMAIN
from fedtide.wire.training import Schedule

GOLDEN: Final = Path(__file__).parent.parent / "golden" / "messages"
_MODULES: Final = ("messages", "model_blob", "envelope", "plan", "parameters", "training")

every_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)


@dataclass(frozen=True)
class Sealed:
    """A message with its key's and its topic's domain."""

    message: Message
    domain: bytes

    @property
    def name(self) -> str:
        return type(self.message).__name__

    def seal(self) -> bytes:
        return seal(self.message, COORDINATOR_KEY, self.domain)

    def unseal(self, sealed: bytes) -> Message:
        return unseal(sealed, type(self.message), COORDINATOR_KEY.public, self.domain)


SEALED: Final = (
    Sealed(HEAD, HEAD_DOMAIN),
    Sealed(STATE, COORDINATOR_DOMAIN),
    Sealed(RECEIPT, DOWN_DOMAIN),
    Sealed(MISSING, DOWN_DOMAIN),
    Sealed(RESYNC, DOWN_DOMAIN),
)

every_sealed = pytest.mark.parametrize("sealed", SEALED, ids=lambda sealed: sealed.name)


def golden(name: str) -> bytes:
    """A golden file's bytes. There is no way to write one from here: a missing file is a failure."""
    file = GOLDEN / f"{name}.bin"
    assert file.is_file(), f"{file} is missing: write it once, by hand, and commit it with the new message"
    return file.read_bytes()


def kinds_below(kind: type[Message]) -> set[type[Message]]:
    below = set(kind.__subclasses__())
    return below.union(*(kinds_below(each) for each in below))


def kinds_inside(value: object) -> set[type[Message]]:
    if isinstance(value, Message):
        fields = [getattr(value, name) for name in value.__struct_fields__]
        return {type(value)}.union(*(kinds_inside(field) for field in fields))
    if isinstance(value, tuple):
        return set[type[Message]]().union(*(kinds_inside(each) for each in value))
    return set()


def test_every_kind_of_message_has_a_sample() -> None:
    for name in _MODULES:
        importlib.import_module(f"fedtide.wire.{name}")
    kinds = {kind for kind in kinds_below(Message) if kind.__module__.startswith("fedtide.wire.")}
    # One manifest has one schedule; test_training_policy.py has them all.
    assert kinds_inside(MESSAGES) | set(get_args(Schedule)) == kinds


@every_message
def test_no_sample_leaves_a_field_at_its_default(message: Message) -> None:
    for field in msgspec.structs.fields(message):
        assert getattr(message, field.name) != field.default, field.name


@every_message
def test_a_message_comes_back_from_its_frame(message: Message) -> None:
    assert frame.from_frame(frame.to_frame(message), type(message)) == message


@every_message
def test_a_frame_is_a_version_byte_and_the_fields_in_their_order(message: Message) -> None:
    whole = frame.to_frame(message)
    tag = ["kind"] if message.__struct_config__.tag else []
    assert whole[0] == 1
    if message.__struct_config__.array_like:
        assert len(msgpack.unpackb(whole[1:])) == len(message.__struct_fields__)
        return
    assert list(msgpack.unpackb(whole[1:])) == [*tag, *message.__struct_encode_fields__]


@every_message
def test_every_truncation_of_a_frame_is_malformed(message: Message) -> None:
    whole = frame.to_frame(message)
    for length in range(len(whole)):
        with pytest.raises(MalformedFrame):
            frame.from_frame(whole[:length], type(message))


@every_message
def test_bytes_after_a_frame_are_malformed(message: Message) -> None:
    for extra in (b"\x00", b"\xc0", frame.to_frame(message)):
        with pytest.raises(MalformedFrame):
            frame.from_frame(frame.to_frame(message) + extra, type(message))


@every_message
def test_the_bytes_of_a_frame_never_change(message: Message) -> None:
    assert frame.to_frame(message) == golden(type(message).__name__)


@every_message
def test_golden_frames_are_still_read(message: Message) -> None:
    assert frame.from_frame(golden(type(message).__name__), type(message)) == message


@every_sealed
def test_a_sealed_message_comes_back(sealed: Sealed) -> None:
    assert sealed.unseal(sealed.seal()) == sealed.message


@every_sealed
def test_every_truncation_of_a_sealed_message_is_malformed(sealed: Sealed) -> None:
    whole = sealed.seal()
    for length in range(len(whole)):
        with pytest.raises(MalformedFrame):
            sealed.unseal(whole[:length])


@every_sealed
def test_a_sealed_message_of_another_version_or_too_large_is_refused(sealed: Sealed) -> None:
    with pytest.raises(UnsupportedVersion):
        sealed.unseal(b"\x02" + sealed.seal()[1:])
    with pytest.raises(FrameTooLarge):
        sealed.unseal(sealed.seal() + bytes(frame.MAX_MESSAGE_BYTES))


@every_sealed
def test_the_bytes_of_a_sealed_message_never_change(sealed: Sealed) -> None:
    assert sealed.seal() == golden(f"{sealed.name}.sealed")


@every_sealed
def test_golden_sealed_messages_are_still_read(sealed: Sealed) -> None:
    assert sealed.unseal(golden(f"{sealed.name}.sealed")) == sealed.message


@pytest.mark.parametrize("message", [RECEIPT, MISSING, RESYNC], ids=lambda message: type(message).__name__)
def test_messages_to_one_device_are_told_apart_by_their_tag(message: Message) -> None:
    sealed = golden(f"{type(message).__name__}.sealed")
    assert unseal_any(sealed, DownMessage, COORDINATOR_KEY.public, DOWN_DOMAIN) == message


def test_the_bytes_of_an_envelope_never_change() -> None:
    assert seal_update(HEADER, PAYLOAD, DEVICE_KEY) == golden("update.envelope")


def test_a_golden_envelope_is_still_read() -> None:
    opened = open_update(golden("update.envelope"), 10_000)
    opened.verify(DEVICE_KEY.public)
    assert (opened.header, opened.payload) == (HEADER, PAYLOAD)


def test_a_golden_plan_is_still_read() -> None:
    # Only read: how small zlib makes a graph depends on its build.
    assert open_plan(golden("plan.sealed"), COORDINATOR_KEY.public) == sample_plan()


def test_no_golden_file_is_left_over() -> None:
    wanted = {type(message).__name__ for message in MESSAGES}
    wanted |= {f"{sealed.name}.sealed" for sealed in SEALED} | {"update.envelope", "plan.sealed"}
    assert {file.name.removesuffix(".bin") for file in GOLDEN.glob("*.bin")} == wanted
    earlier = {f"{name}{end}" for name in EARLIER for end in ("", ".sealed")}
    assert {file.name.removesuffix(".bin") for file in GOLDEN.glob("earlier/*")} == earlier


EARLIER: Final = {
    "CoordinatorState": msgspec.structs.replace(STATE, run="", spread_s=0.0),
    "Receipt": msgspec.structs.replace(RECEIPT, epoch=0, highest=0),
    "MissingChunks": msgspec.structs.replace(MISSING, epoch=0),
}
"""What the bytes in ``earlier`` say, which builds sent before these messages grew."""


@pytest.mark.parametrize("name", EARLIER)
def test_messages_of_builds_that_knew_fewer_fields_are_still_read(name: str) -> None:
    expected = EARLIER[name]
    assert frame.from_frame(golden(f"earlier/{name}"), type(expected)) == expected
    (domain,) = (each.domain for each in SEALED if each.name == name)
    sealed = golden(f"earlier/{name}.sealed")
    assert unseal(sealed, type(expected), COORDINATOR_KEY.public, domain) == expected


@every_message
def test_fields_of_a_newer_build_pass_unread(message: Message) -> None:
    content = msgpack.unpackb(frame.pack(message), strict_map_key=False)
    if isinstance(content, list):
        content.append({"a newer": "field"})
    else:
        content = {"a newer field": [1, 2, 3], **content, "another": None}
    assert frame.unpack(msgpack.packb(content), type(message)) == message


@every_message
def test_fields_that_an_older_build_does_not_know_take_their_defaults(message: Message) -> None:
    kind, content = type(message), msgpack.unpackb(frame.pack(message), strict_map_key=False)
    fields = msgspec.structs.fields(message)
    optional = {field.name for field in fields if not field.required}
    if isinstance(content, list):
        older = msgpack.packb(content[: len(fields) - len(optional)])
    else:
        names = {field.encode_name for field in fields if not field.required}
        older = msgpack.packb({name: value for name, value in content.items() if name not in names})
    read = frame.unpack(older, kind)
    for field in fields:
        sent = getattr(message, field.name)
        assert (getattr(read, field.name) == sent) == field.required, field.name


def test_newer_heads_compare_greater_by_epoch_and_then_by_version() -> None:
    orders = [
        msgspec.structs.replace(HEAD, epoch=epoch, version=version).order
        for epoch, version in [(1, 9), (2, 0), (2, 1)]
    ]
    assert orders == sorted(orders)
    assert isinstance(HEAD, Head)
    assert HEAD.order == (3, 41)


@pytest.mark.parametrize("message", [EVENT, EVALUATION, TROUBLE], ids=lambda each: type(each).__name__)
def test_what_a_device_says_is_told_apart_by_its_tag(message: Message) -> None:
    assert frame.unpack_any(golden(type(message).__name__)[1:], DeviceEvent) == message


def test_an_unknown_tag_names_the_known_kinds() -> None:
    with pytest.raises(MalformedFrame, match="none of TrainingEvent, EvaluationEvent, Trouble"):
        frame.unpack_any(msgpack.packb({"kind": "gossip"}), DeviceEvent)
