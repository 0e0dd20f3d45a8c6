"""The shelf: the blobs that are retained on the broker, and when they are taken away again.

Blobs are content-addressed. What one of the last three versions named stays, because a device may still be
fetching it when the next head appears; what none of them named is cleared. A file says what is there, so that
the next run of the coordinator clears what this one left.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from fedtide.wire import frame
from fedtide.wire.chunks import split
from fedtide.wire.disk import OS_DISK, UNSYNCED_DISK, Disk, write_durably
from fedtide.wire.errors import WireError
from fedtide.wire.frame import Message
from fedtide.wire.ids import BlobId, FleetId, ModelVersion
from fedtide.wire.link import Connection
from fedtide.wire.messages import BlobRef
from fedtide.wire.topics import BLOB_CHUNK

log = logging.getLogger(__name__)

_KEPT_VERSIONS: Final = 3
_MAX_FILE_BYTES: Final = 1 << 20


class _Retained(Message, frozen=True, kw_only=True):
    """The content of the file."""

    blobs: tuple[BlobRef, ...]


class Shelf:
    """What is on the broker.

    Args:
        fleet: whose blobs.
        path: the file that remembers them; None: nothing does.
        disk: where that is. Not synced: at worst some blobs of a run whose machine lost its power are never
            cleared.
    """

    def __init__(self, fleet: FleetId, path: Path | None = None, disk: Disk = UNSYNCED_DISK) -> None:
        self._fleet = fleet
        self._path = path
        self._disk = disk
        self._retained: dict[BlobId, BlobRef] = {ref.id: ref for ref in _read(disk, path)}
        self._whole: set[BlobId] = set()
        # What an earlier run left counts as named by the version before this run's first.
        self._named: deque[tuple[ModelVersion | None, set[BlobId]]] = deque(maxlen=_KEPT_VERSIONS)
        self._named.append((None, set(self._retained)))

    def forget(self) -> None:
        """The broker may have lost everything: whatever is put is sent again."""
        self._whole.clear()

    async def put(self, connection: Connection, blobs: Mapping[BlobRef, bytes]) -> None:
        """Publish blobs, but for those that are there; every chunk is acknowledged when this returns.

        Raises:
            LinkDown: the connection was lost.
        """
        missing = {ref: content for ref, content in blobs.items() if ref.id not in self._whole}
        if not missing:
            return
        for ref in missing:
            before = self._retained.get(ref.id)
            # In other chunks than before: the more there are, the more there are to clear.
            if before is None or before.chunks < ref.chunks:
                self._retained[ref.id] = ref
        self._write()
        await asyncio.gather(
            *(
                connection.publish(self._topic(ref, index), piece, retain=True)
                for ref, content in missing.items()
                for index, piece in enumerate(split(content, ref.chunk_bytes))
            )
        )
        self._whole |= {ref.id for ref in missing}

    async def keep_only(
        self, connection: Connection, version: ModelVersion, named: Iterable[BlobRef]
    ) -> None:
        """Clear what neither this version nor the two before it named.

        Raises:
            LinkDown: the connection was lost; the next version clears the rest.
        """
        ids = {ref.id for ref in named}
        if self._named[-1][0] == version:
            ids |= self._named.pop()[1]
        self._named.append((version, ids))
        kept = set().union(*(names for _, names in self._named))
        try:
            for old in [ref for ref in self._retained.values() if ref.id not in kept]:
                self._whole.discard(old.id)
                for index in range(old.chunks):
                    # An empty retained message takes the retained one away (MQTT 5 section 3.3.1.3).
                    await connection.publish(self._topic(old, index), b"", retain=True)
                del self._retained[old.id]  # not before: where the connection was lost, the next clears it
        finally:
            self._write()

    def _write(self) -> None:
        if self._path is not None:
            content = frame.to_frame(_Retained(blobs=tuple(self._retained.values())))
            write_durably(self._disk, self._path, content)

    def _topic(self, ref: BlobRef, index: int) -> str:
        return BLOB_CHUNK.name(self._fleet, blob=ref.id, index=index)


def unsynced(disk: Disk) -> Disk:
    """The disk for the shelf's file: the system's without syncs, or a test's own."""
    return UNSYNCED_DISK if disk is OS_DISK else disk


def _read(disk: Disk, path: Path | None) -> tuple[BlobRef, ...]:
    if path is None:
        return ()
    try:
        return frame.from_frame(disk.read(path), _Retained, _MAX_FILE_BYTES).blobs
    except FileNotFoundError:
        return ()
    except WireError as error:
        log.warning("%s cannot be read, so blobs of earlier runs stay on the broker: %s", path, error,
                    extra={"event": "shelf.damaged"})  # fmt: skip
        return ()
