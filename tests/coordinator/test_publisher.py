"""A version is offered once all of it is there; what nobody needs any more is taken away."""

import asyncio

import msgspec
import numpy as np
import pytest
from recording_connection import RecordingConnection, retained
from small_fleet import FLEET, PLAN, SCHEMA, constant, device_key, make_settings

from coordinator.closed_loop import Version
from coordinator.model_blobs import BlobMaker
from coordinator.publisher import Identity, Publisher
from coordinator.settings import Later, Publish, Update
from coordinator.shelf import Shelf
from fedtide.wire.chunks import join_blob
from fedtide.wire.link import LinkDown
from fedtide.wire.messages import CoordinatorState, Head
from fedtide.wire.model_blob import keyframe_parameters
from fedtide.wire.parameters import Schema, TensorSpec, fingerprint
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, HEAD_DOMAIN

KEY = device_key("coordinator")
HEAD = "fl/1/pumps/model/head"
LARGE = np.arange(800, dtype=np.float32)  # 3200 bytes and less than 64 of the blob: four chunks of 1024
LARGE_SCHEMA = Schema(tensors=(TensorSpec(name="p.all", dtype="float32", shape=(800,)),))
FLOAT32 = Publish(format="float32")


def make_publisher(remember=None, shelf=None, released=None, schema=SCHEMA, **changes):
    kept = {}

    async def remembered(version):
        kept[version.place.sequence] = version

    def earlier(sequence):
        return (kept[sequence].number, kept[sequence].parameters) if sequence in kept else None

    settings = make_settings(chunk_bytes=1024, **{"publish": FLOAT32, **changes})
    return Publisher(
        settings,
        Identity(5, "run", PLAN.plan.id, b"the plan", KEY),
        remember or remembered,
        lambda: 1000.0,
        maker=BlobMaker(settings.publish, schema, earlier),
        shelf=shelf or Shelf(FLEET),
        released=released,
    )


def version(number, parameters=None):
    return Version.of(number, constant(float(number)) if parameters is None else parameters)


def heads(connection):
    return [unseal(sealed, Head, KEY.public, HEAD_DOMAIN) for sealed in connection.payloads(HEAD)]


def blob(connection, ref):
    held, topic = retained(connection.published), f"fl/1/pumps/model/b/{ref.id}"
    return join_blob(ref, {index: held[f"{topic}/{index}"] for index in range(ref.chunks)})


def whole(connection, ref, number):
    """What a device takes from a keyframe of version ``number``, as large as ``LARGE``."""
    return keyframe_parameters(blob(connection, ref), number, LARGE_SCHEMA).tolist()


def test_the_head_comes_after_every_chunk_it_points_at():
    async def scenario():
        connection = RecordingConnection()
        await make_publisher().publish(connection, version(1, LARGE))
        return connection

    connection = asyncio.run(scenario())
    (head,) = heads(connection)
    assert connection.topics()[-1] == HEAD
    assert all(publication.retain for publication in connection.published)
    assert len(connection.published) == 1 + 4 + 1  # the plan, the model, the head
    assert whole(connection, head.full_blob, head.version) == LARGE.tolist()
    assert blob(connection, head.plan_blob) == b"the plan"


def test_the_head_says_what_a_device_must_know():
    publish = Publish(head_lifetime_s=50.0, format="float32")
    publisher = make_publisher(publish=publish, update=Update(codec="float16"))

    async def scenario():
        connection = RecordingConnection()
        await publisher.publish(connection, version(3))
        return heads(connection)

    (head,) = asyncio.run(scenario())
    assert (head.fleet, head.epoch, head.version, head.plan) == (FLEET, 5, 3, PLAN.plan.id)
    assert head.parameters_sha256 == fingerprint(constant(3.0))
    assert head.training
    assert (head.issued, head.expires) == (1000.0, 1050.0)
    assert head.update_codec.id == "float16"


def test_the_head_asks_for_the_codec_parameters_of_its_version():
    later = (
        Later(from_version=2, codec_parameters={"step": 4.0}),
        Later(from_version=4, codec_parameters={"bits_per_parameter": 0.5}),
    )
    publisher = make_publisher(
        update=Update(codec="ecsq", codec_parameters={"step": 16.0}, later=later),
    )

    async def scenario():
        connection = RecordingConnection()
        for number in (1, 2, 3, 5):  # a version that a change begins with need not be published itself
            await publisher.publish(connection, version(number))
        await publisher.renew(connection, everything=False)
        return heads(connection)

    asked = [(head.version, head.update_codec.parameters) for head in asyncio.run(scenario())]
    assert asked == [
        (1, {"step": 16.0}),
        (2, {"step": 4.0}),
        (3, {"step": 4.0}),
        (5, {"bits_per_parameter": 0.5}),
        (5, {"bits_per_parameter": 0.5}),
    ]


def test_a_version_is_durable_before_any_of_it_is_sent():
    connection = RecordingConnection()
    sent_before = []

    async def remember(_version):
        sent_before.append(len(connection.published))

    asyncio.run(make_publisher(remember).publish(connection, version(1)))
    assert sent_before == [0]


def test_a_version_that_cannot_be_made_durable_is_not_offered():
    async def disk_full(_version):
        raise OSError(28, "No space left on device")

    connection = RecordingConnection()
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(make_publisher(disk_full).publish(connection, version(1)))
    assert connection.published == []


def test_each_head_names_the_fingerprint_of_the_one_before():
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher()
        for number in (1, 2, 5):
            await publisher.publish(connection, version(number))
        return heads(connection)

    first, second, third = asyncio.run(scenario())
    assert first.parent_sha256 == bytes(32)
    assert second.parent_sha256 == first.parameters_sha256
    assert third.parent_sha256 == second.parameters_sha256


def test_three_models_stay_and_older_ones_are_cleared():
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher()
        for number in range(1, 6):
            await publisher.publish(connection, version(number))
        return connection

    connection = asyncio.run(scenario())
    kept = {head.full_blob.id for head in heads(connection)[-3:]} | {heads(connection)[0].plan_blob.id}
    blobs = {topic.split("/")[5] for topic in retained(connection.published) if "/b/" in topic}
    assert blobs == kept


def test_models_of_the_run_before_are_cleared_in_their_turn(tmp_path):
    async def scenario():
        before, after = RecordingConnection(), RecordingConnection()
        first = make_publisher(shelf=Shelf(FLEET, tmp_path / "shelf"))
        for number in (1, 2):
            await first.publish(before, version(number))
        second = make_publisher(shelf=Shelf(FLEET, tmp_path / "shelf"))
        for number in (2, 3, 4):
            await second.publish(after, version(number))
        return before, after

    before, after = asyncio.run(scenario())
    held = retained([*before.published, *after.published])
    left = {topic.split("/")[5] for topic in held if "/b/" in topic}
    models = {head.full_blob.id for head in heads(after)}
    assert left == models | {heads(after)[0].plan_blob.id}
    assert len(models) == 3


def test_parameters_that_come_back_are_not_cleared():
    """Versions 1 and 4 have the same parameters, so the same blob; it must survive for version 4."""

    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher()
        for number, value in enumerate([1.0, 2.0, 3.0, 1.0, 5.0], start=1):
            await publisher.publish(connection, version(number, constant(value)))
        return connection

    connection = asyncio.run(scenario())
    for head in heads(connection)[-3:]:
        assert blob(connection, head.full_blob)


def test_a_renewed_head_sends_no_chunk_again():
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher()
        await publisher.publish(connection, version(1, LARGE))
        before = len(connection.published)
        await publisher.renew(connection, everything=False)
        return [publication.topic for publication in connection.published[before:]]

    assert asyncio.run(scenario()) == [HEAD]


def test_a_broker_that_forgot_gets_everything_again():
    async def scenario():
        publisher, empty = make_publisher(), RecordingConnection()
        await publisher.publish(RecordingConnection(), version(1, LARGE))
        await publisher.renew(empty, everything=True)
        return empty

    empty = asyncio.run(scenario())
    (head,) = heads(empty)
    assert whole(empty, head.full_blob, head.version) == LARGE.tolist()
    assert blob(empty, head.plan_blob) == b"the plan"
    assert empty.topics()[-1] == HEAD


def test_before_the_first_version_there_is_nothing_to_renew():
    connection = RecordingConnection()
    asyncio.run(make_publisher().renew(connection, everything=True))
    assert connection.published == []


def test_a_lost_connection_leaves_the_rest_to_the_next_one():
    async def scenario():
        publisher, first, second = make_publisher(), RecordingConnection(), RecordingConnection()
        first.hold("/3")  # the last of four chunks
        publishing = asyncio.create_task(publisher.publish(first, version(1, LARGE)))
        await first.until(lambda: len(first.published) == 4)
        first.lose()
        with pytest.raises(LinkDown):
            await publishing
        await publisher.renew(second, everything=False)
        return first, second

    first, second = asyncio.run(scenario())
    assert heads(first) == []
    (head,) = heads(second)
    assert whole(second, head.full_blob, head.version) == LARGE.tolist()


def test_an_older_head_never_follows_a_newer_one():
    """The last version is published while the one before is still on its way."""

    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher()
        gate = connection.hold("/b/")
        first = asyncio.create_task(publisher.publish(connection, version(1)))
        second = asyncio.create_task(publisher.publish(connection, version(2)))
        renewal = asyncio.create_task(publisher.renew(connection, everything=False))
        await asyncio.wait([first, second, renewal], timeout=0.05)
        gate.set()
        await asyncio.gather(first, second, renewal)
        return connection

    numbers = [head.version for head in heads(asyncio.run(scenario()))]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 2


def test_chunks_fit_what_the_broker_announced():
    async def scenario():
        connection = RecordingConnection(max_packet_bytes=1024 + 500)
        await make_publisher().publish(connection, version(1, LARGE))
        return connection

    connection = asyncio.run(scenario())
    (head,) = heads(connection)
    assert (head.full_blob.chunk_bytes, head.full_blob.chunks) == (500, 7)  # 3200 / 500 = 6.4
    assert max(len(p.payload) for p in connection.published if "/b/" in p.topic) == 500


@pytest.mark.parametrize("online", [True, False])
def test_the_coordinators_state_is_signed_and_retained(online):
    connection, publisher = RecordingConnection(), make_publisher()
    asyncio.run(publisher.announce(connection, online=online))
    (publication,) = connection.published
    state = unseal(publication.payload, CoordinatorState, KEY.public, COORDINATOR_DOMAIN)
    assert (publication.topic, publication.retain) == ("fl/1/pumps/coord", True)
    assert msgspec.structs.asdict(state) | {"online": None} == {
        "fleet": FLEET,
        "epoch": 5,
        "run": "run",
        "spread_s": 0.0,
        "online": None,
        "protocol_min": 1,
        "protocol_max": 1,
        "shards": 1,
    }
    assert state.online is online
