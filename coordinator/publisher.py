"""The publisher: makes a version available, and only then points at it.

Order: the model file and its fingerprint are durable, every chunk is acknowledged by the broker, then the
signed head. Chunks are content-addressed and retained; those of old models are cleared, but for the released
one, which stays as long as it is the release.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from coordinator.settings import CoordinatorSettings
from fedtide.wire.chunks import blob_ref, chunk_bytes, split
from fedtide.wire.frame import PROTOCOL_VERSION
from fedtide.wire.ids import BlobId, Epoch, ModelVersion, PlanId, blob_id
from fedtide.wire.link import Connection
from fedtide.wire.messages import BlobRef, CodecRequest, CoordinatorState, Head, Release
from fedtide.wire.parameters import Vector, fingerprint, to_bytes
from fedtide.wire.seal import seal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, HEAD_DOMAIN, SigningKey
from fedtide.wire.topics import BLOB_CHUNK, COORDINATOR, HEAD

_KEPT_MODELS: Final = 3  # a device may still be fetching the last one when the next head appears


@dataclass(frozen=True)
class Version:
    """A model version as devices will hold it."""

    number: ModelVersion
    parameters: Vector
    fingerprint: bytes

    @classmethod
    def of(cls, number: ModelVersion, parameters: Vector) -> "Version":
        """With the fingerprint computed."""
        return cls(number, parameters, fingerprint(parameters))


@dataclass(frozen=True)
class Released:
    """A version for inference, and the gate that it passed, for people."""

    version: Version
    gate: str


@dataclass(frozen=True)
class Identity:
    """Who publishes: fixed for one run of the coordinator."""

    epoch: Epoch
    plan: PlanId
    plan_blob: bytes
    key: SigningKey


class Publisher:
    """Publishes the head and its blobs on whatever connection there is.

    Args:
        settings: the coordinator's.
        identity: who publishes.
        remember: makes a version's file and fingerprint durable; awaited before the version is offered.
        clock: seconds since 1970.
        earlier: fingerprints of the versions that earlier runs published, oldest first; their chunks may
            still be retained and are cleared in their turn.
        released: the version that passed the release gate last, in an earlier run.

    Attributes:
        version: the last one offered.
        released: the one for inference, where there is a gate. Without a gate it is the one offered.
        training: whether devices shall train.
        issued: when the last head was made, seconds since 1970.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        identity: Identity,
        remember: Callable[[Version], Awaitable[None]],
        clock: Callable[[], float],
        *,
        earlier: Sequence[bytes] = (),
        released: Released | None = None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._remember = remember
        self._clock = clock
        self._parent = earlier[-1] if earlier else bytes(32)
        self._earlier = list(earlier[-_KEPT_MODELS:])
        self._models: list[BlobRef] = []
        self._offered: set[BlobId] = set()
        self._offering = asyncio.Lock()  # one at a time, or an older head could be the last to arrive
        self.version: Version | None = None
        self.training = True
        self.released = released
        self._announced: Released | None = None
        self.issued = 0.0

    @property
    def release_is_news(self) -> bool:
        """Whether no head has named the released version yet."""
        return self.released is not self._announced

    def state_message(self, *, online: bool) -> bytes:
        """The sealed coordinator state, also used as the will."""
        state = CoordinatorState(
            fleet=self._settings.fleet,
            epoch=self._identity.epoch,
            online=online,
            protocol_min=PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
        )
        return seal(state, self._identity.key, COORDINATOR_DOMAIN)

    async def announce(self, connection: Connection, *, online: bool) -> None:
        """Say whether the coordinator is there."""
        topic = COORDINATOR.name(self._settings.fleet)
        await connection.publish(topic, self.state_message(online=online), retain=True)

    async def renew(self, connection: Connection, *, everything: bool) -> None:
        """Publish the head again; with ``everything``, its blobs too: the broker forgot them.

        Raises:
            LinkDown: the connection was lost; the next one renews.
        """
        async with self._offering:
            if everything:
                self._offered.clear()
            if self.version is not None:
                await self._offer(connection, self.version)

    async def publish(self, connection: Connection, version: Version) -> None:
        """Offer a new version; one that is older than the last is left.

        Raises:
            LinkDown: the connection was lost; the next one renews.
        """
        async with self._offering:
            if self.version is not None and version.number < self.version.number:
                return
            await self._remember(version)
            if self.version is not None and version.number > self.version.number:
                self._parent = self.version.fingerprint
            self.version = version
            await self._offer(connection, version)

    async def _offer(self, connection: Connection, version: Version) -> None:
        size_bytes = chunk_bytes(connection.max_packet_bytes, self._settings.chunk_bytes)
        content = to_bytes(version.parameters)
        plan = blob_ref(self._identity.plan_blob, size_bytes)
        model = blob_ref(content, size_bytes)
        # The blob of a model is its parameters' bytes, so its id follows from the fingerprint.
        self._models += [replace(model, id=blob_id(old), sha256=old) for old in self._earlier]
        self._earlier.clear()
        await self._put(connection, plan, self._identity.plan_blob)
        await self._put(connection, model, content)
        released = self.released
        release = await self._put_release(connection, released, model)
        head = self._head(version, plan, model, release or self._ungated(version, model))
        sealed = seal(head, self._identity.key, HEAD_DOMAIN)
        await connection.publish(HEAD.name(self._settings.fleet), sealed, retain=True)
        self.issued, self._announced = head.issued, released
        await self._clear_old(connection, model, release)

    async def _put_release(
        self, connection: Connection, released: Released | None, model: BlobRef
    ) -> Release | None:
        """Publish the blob of the version that passed the gate, unless it is there."""
        if released is None:
            return None
        version = released.version
        # As large as any model, and its id follows from the fingerprint: no need to hash it again.
        blob = replace(model, id=blob_id(version.fingerprint), sha256=version.fingerprint)
        if blob.id not in self._offered:
            await self._put(connection, blob, to_bytes(version.parameters))
        return Release(
            version=version.number,
            parameters_sha256=version.fingerprint,
            blob=blob,
            gate=released.gate,
        )

    def _ungated(self, version: Version, model: BlobRef) -> Release | None:
        """Without a gate, what is offered is for inference too."""
        if self._settings.release is not None:
            return None
        return Release(version=version.number, parameters_sha256=version.fingerprint, blob=model)

    def _head(self, version: Version, plan: BlobRef, model: BlobRef, release: Release | None) -> Head:
        now = self._clock()
        update = self._settings.update
        return Head(
            fleet=self._settings.fleet,
            epoch=self._identity.epoch,
            version=version.number,
            parent_sha256=self._parent,
            plan=self._identity.plan,
            parameters_sha256=version.fingerprint,
            plan_blob=plan,
            full_blob=model,
            update_codec=CodecRequest(id=update.codec, parameters=update.codec_parameters),
            training=self.training,
            release=release,
            issued=now,
            expires=now + self._settings.publish.head_lifetime_s,
        )

    async def _put(self, connection: Connection, ref: BlobRef, content: bytes) -> None:
        if ref.id in self._offered:
            return
        pieces = enumerate(split(content, ref.chunk_bytes))
        await asyncio.gather(
            *(
                connection.publish(self._chunk_topic(ref, index), piece, retain=True)
                for index, piece in pieces
            )
        )
        self._offered.add(ref.id)

    async def _clear_old(self, connection: Connection, newest: BlobRef, release: Release | None) -> None:
        self._models = [ref for ref in self._models if ref.id != newest.id] + [newest]
        kept = {ref.id for ref in self._models[-_KEPT_MODELS:]}
        if release is not None:
            kept.add(release.blob.id)
            if release.blob.id not in {ref.id for ref in self._models}:
                self._models.insert(0, release.blob)
        for old in [ref for ref in self._models if ref.id not in kept]:
            self._offered.discard(old.id)
            for index in range(old.chunks):
                # An empty retained message takes the retained one away (MQTT 5 section 3.3.1.3).
                await connection.publish(self._chunk_topic(old, index), b"", retain=True)
            self._models.remove(old)  # not before: where the connection was lost, the next offer clears it

    def _chunk_topic(self, ref: BlobRef, index: int) -> str:
        return BLOB_CHUNK.name(self._settings.fleet, blob=ref.id, index=index)
