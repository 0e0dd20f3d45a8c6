"""Windows of sensor readings that the agent itself hears on MQTT and keeps in a ring on disk."""

import hashlib
from collections.abc import Hashable
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from edge_agent.data_sources.base import Bytes, Count, FileSource
from edge_agent.data_sources.fitting import Arrays, fitted
from edge_agent.dataset import Dataset, Skipped
from edge_agent.readings import Channel, Sampling
from edge_agent.window_ring import LAYOUT_BYTES, Layout, read_ring, ring_stamp
from edge_agent.windows import oriented
from fedtide.wire.link import Broker
from fedtide.wire.plan import PlanManifest

Seconds = Annotated[float, Meta(gt=0)]


class Sensor(FileSource, frozen=True, tag="sensor"):
    """Readings on ordinary MQTT topics, cut into windows; for models that give back their input.

    ``path`` is the folder of the ring, which the agent makes. The values in it are as they came;
    they are scaled when they are read.

    Attributes:
        channels: the values of a row, in order.
        window: rows per window.
        stride: rows from the start of one window to the start of the next; None: as many as a window has.
        every_s: seconds between rows, each of the latest value of every channel. None: every message is a
            row, and all channels come on one topic.
        stale_s: a value older than that, or a gap of that length between messages, breaks the window begun.
        flush_s: windows are written to disk that often; a power cut loses what came since.
        max_bytes: of the ring on disk.
        channels_first: the order of a window's axes, where the plan's shape does not tell.
        broker: where the sensors publish; None: the fleet's broker.
    """

    channels: Annotated[tuple[Channel, ...], Meta(min_length=1)]
    window: Count
    stride: Count | None = None
    every_s: Annotated[float, Meta(ge=0.01)] | None = None
    stale_s: Seconds = 3600.0
    flush_s: Seconds = 60.0
    max_bytes: Bytes = 16 << 20
    channels_first: bool | None = None
    broker: Broker | None = None

    def __post_init__(self) -> None:
        topics = {channel.topic for channel in self.channels}
        if self.every_s is None and len(topics) > 1:
            raise ValueError(
                f"channels on {len(topics)} topics need every_s, the seconds between rows; "
                "without it every message is a row"
            )
        needed, capacity = max(self.min_examples, self.min_new_examples), self.layout.capacity(self.max_bytes)
        if capacity < needed:
            raise ValueError(
                f"a ring of max_bytes = {self.max_bytes} keeps {capacity} windows of this size; "
                f"{needed} are needed to train"
            )

    @property
    def sampling(self) -> Sampling:
        """How rows and windows are made."""
        return Sampling(self.channels, self.window, self.stride or self.window, self.every_s, self.stale_s)

    @property
    def layout(self) -> Layout:
        """Of the ring. Other channels or another pace give another one; another scale does not."""
        what = [(channel.topic, channel.field) for channel in self.channels], self.window, self.every_s
        digest = hashlib.sha256(msgspec.json.encode(what)).digest()
        return Layout(digest[:LAYOUT_BYTES], self.window * len(self.channels))

    def _stamp(self) -> Hashable:
        return ring_stamp(self.path)

    def _read(self, manifest: PlanManifest) -> Dataset:
        if manifest.targets is not None:
            raise ValueError(
                f"windows of a sensor have no labels, and the plan takes {manifest.targets.name!r}; "
                "a model that gives back its input needs none"
            )
        kept = read_ring(self.path, self.layout)
        windows = kept.windows.reshape(-1, self.window, len(self.channels))
        windows -= np.array([channel.mean for channel in self.channels], np.float32)
        windows /= np.array([channel.deviation for channel in self.channels], np.float32)
        shape = tuple(axis or 1 for axis in manifest.inputs[0].shape[1:])
        inputs = oriented(windows, shape, channels_first=self.channels_first)
        damaged = Skipped("damaged on disk", kept.damaged, f"in {self.path}")
        skipped = (damaged,) if kept.damaged else ()
        overlap = -(-self.window // self.stride) if self.stride and self.stride < self.window else 0
        arrays = Arrays([inputs], None, kept.positions, skipped, overlap)
        return fitted(arrays, manifest, may_be_empty=True)
