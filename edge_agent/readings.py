"""Readings of sensors over MQTT become rows, and rows become windows. Pure: time comes in as an argument.

Two ways to make rows. Every message is a row, where one topic carries all channels. Or every so many seconds
the latest value of each channel is taken (sample and hold), where channels come on topics of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from edge_agent.dataset import SkipTally
from edge_agent.values import NOT_A_NUMBER, BadValue, Scale, number_of
from edge_agent.windows import Cutter, Floats

MAX_PAYLOAD_BYTES: Final = 64 << 10
NO_JSON: Final = "payload that is not JSON"
NO_FIELD: Final = "payload without the field"
TOO_LARGE: Final = "payload too large"
TOO_MANY_TOPICS: Final = "topic too many"
_MOST_TOPICS: Final = 256  # that windows are cut from at a time, where a filter has wildcards
_LATE_ROWS: Final = 10  # held values fill so many rows when the caller is late; after more, a window breaks


class Channel(Scale, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One value of every row.

    Attributes:
        topic: topic filter of the messages that carry it; ``+`` and ``#`` as in MQTT.
        field: where it stands in a JSON payload: names, or numbers in lists, joined by dots, for example
            ``ENERGY.Power``; None: the payload is the value itself.
    """

    topic: str
    field: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_filter(self.topic)
        if self.field is not None and not all(self.field.split(".")):
            raise ValueError(f"field {self.field!r} has an empty name between its dots")

    def read(self, payload: bytes) -> float:
        """The value that a payload carries, not scaled.

        Raises:
            BadValue: none; the reason says why.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise BadValue(TOO_LARGE, f"{len(payload):,} bytes; {MAX_PAYLOAD_BYTES:,} are read")
        if self.field is None:
            return _plain(payload)
        try:
            value = msgspec.json.decode(payload)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise BadValue(NO_JSON, f"{payload[:60]!r}: {error}") from None
        for name in self.field.split("."):
            value = _below(value, name)
        return number_of(value)


def _plain(payload: bytes) -> float:
    try:
        text = payload.decode().strip()
    except UnicodeDecodeError:
        raise BadValue.of(payload, NOT_A_NUMBER) from None
    if len(text) > 1 and text[0] == text[-1] == '"':  # a JSON string
        text = text[1:-1]
    return number_of(text)


def _below(value: Any, name: str) -> Any:
    if isinstance(value, dict) and name in value:
        return value[name]
    if isinstance(value, list) and name.isascii() and name.isdigit() and int(name) < len(value):
        return value[int(name)]
    raise BadValue(NO_FIELD, f"there is no {name!r}")


def _check_filter(topic: str) -> None:
    levels = topic.split("/")
    wrong = [level for level in levels if ("+" in level and level != "+") or ("#" in level and level != "#")]
    if not topic or wrong or "#" in levels[:-1] or "\0" in topic:
        raise ValueError(
            f"topic {topic!r} is no topic filter: '+' and '#' stand for whole levels, '#' for the last"
        )


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic name matches a topic filter (MQTT 5 section 4.7)."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if levels[0].startswith("$") and wanted[0] in {"+", "#"}:
        return False
    if wanted[-1] == "#":
        wanted = wanted[:-1]
        levels = levels[: len(wanted)]
    return len(wanted) == len(levels) and all(
        want in {"+", level} for want, level in zip(wanted, levels, strict=True)
    )


@dataclass(frozen=True)
class Sampling:
    """How rows and windows are made.

    Attributes:
        channels: the values of a row, in order.
        window: rows per window.
        stride: rows from the start of one window to the start of the next.
        every_s: seconds between rows; None: every message is a row.
        stale_s: a value that is older breaks the window begun; so does a gap between messages.
    """

    channels: tuple[Channel, ...]
    window: int
    stride: int
    every_s: float | None
    stale_s: float


@dataclass
class _Held:
    """The latest value of a channel; none yet while ``at`` is minus infinity."""

    value: float = math.nan
    at: float = -math.inf


@dataclass
class _Stream:
    """Rows that follow one another."""

    cutter: Cutter
    last: float = field(default=-math.inf)


class Sampler:
    """Takes messages and gives windows of raw values, float32 of shape ``(window, channels)``.

    Attributes:
        bad: values and messages that were no use, counted by reason.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._held = [_Held() for _ in sampling.channels]
        self._streams: dict[str, _Stream] = {}
        self._due: float | None = None
        self.bad = SkipTally()

    def take(self, topic: str, payload: bytes, now: float, *, retained: bool = False) -> list[Floats]:
        """Take one message; the windows that it completes.

        Args:
            topic: the topic name it came on.
            payload: as it came.
            now: seconds, of a clock that never goes back.
            retained: it is what the broker kept, not news: the start of a held value, and never a row.
        """
        if self._sampling.every_s is not None:
            self._hold(topic, payload, now, retained=retained)
            return []
        return [] if retained else self._row(topic, payload, now)

    def tick(self, now: float) -> list[Floats]:
        """The windows that the rows due until ``now`` complete; nothing where every message is a row."""
        every_s = self._sampling.every_s
        if every_s is None:
            return []
        if self._due is None or now - self._due > _LATE_ROWS * every_s:
            self._stream("").cutter.break_off()
            self._due = now
        windows = []
        while self._due <= now:
            windows += self._sample(self._due)
            self._due += every_s
        return windows

    def next_row(self, now: float) -> float:
        """Seconds until a row is due; infinite where every message is a row."""
        if self._sampling.every_s is None:
            return math.inf
        return 0.0 if self._due is None else max(0.0, self._due - now)

    def _hold(self, topic: str, payload: bytes, now: float, *, retained: bool) -> None:
        for channel, held in zip(self._sampling.channels, self._held, strict=True):
            if not matches(channel.topic, topic) or (retained and math.isfinite(held.at)):
                continue
            try:
                held.value = channel.read(payload)
            except BadValue as bad:
                self._count(topic, channel, bad)
            else:
                held.at = now

    def _sample(self, now: float) -> list[Floats]:
        stream = self._stream("")
        if any(now - held.at > self._sampling.stale_s for held in self._held):
            stream.cutter.break_off()
            return []
        window = stream.cutter.add(tuple(held.value for held in self._held))
        return [] if window is None else [window]

    def _row(self, topic: str, payload: bytes, now: float) -> list[Floats]:
        if not matches(self._sampling.channels[0].topic, topic):
            return []
        stale_s = self._sampling.stale_s
        if topic not in self._streams and len(self._streams) >= _MOST_TOPICS:
            self._streams = {name: kept for name, kept in self._streams.items() if now - kept.last <= stale_s}
        if topic not in self._streams and len(self._streams) >= _MOST_TOPICS:
            self.bad.add(TOO_MANY_TOPICS, f"{topic}: windows are cut from {_MOST_TOPICS} topics already")
            return []
        stream = self._stream(topic)
        if now - stream.last > stale_s:
            stream.cutter.break_off()
        values = []
        for channel in self._sampling.channels:
            try:
                values.append(channel.read(payload))
            except BadValue as bad:
                self._count(topic, channel, bad)
                stream.cutter.break_off()  # a window never spans a message that was skipped
                return []
        stream.last = now
        window = stream.cutter.add(tuple(values))
        return [] if window is None else [window]

    def _stream(self, topic: str) -> _Stream:
        if topic not in self._streams:
            self._streams[topic] = _Stream(Cutter(self._sampling.window, self._sampling.stride))
        return self._streams[topic]

    def _count(self, topic: str, channel: Channel, bad: BadValue) -> None:
        place = topic if channel.field is None else f"{topic} {channel.field}"
        self.bad.add(bad.reason, f"{place}: {bad}")


def topic_filters(channels: Sequence[Channel]) -> list[str]:
    """What to subscribe to: each filter once, in order."""
    return list(dict.fromkeys(channel.topic for channel in channels))
