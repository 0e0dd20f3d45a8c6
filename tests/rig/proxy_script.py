"""What a proxy shall do, as values: troubles of single packets, and the ends of connections."""

from dataclasses import dataclass
from enum import IntEnum


class Toward(IntEnum):
    """Which way a packet goes."""

    BROKER = 0
    PEER = 1


class Unit(IntEnum):
    """What a cut counts."""

    BYTES = 0
    PUBLISHES = 1


@dataclass(frozen=True)
class Trouble:
    """What befalls PUBLISH packets of one direction.

    Attributes:
        toward: which way.
        topics: a topic filter: which of them.
        drop: probability that it vanishes.
        duplicate: that it comes a second time, up to ``hold_s`` later.
        reorder: that it is held back, up to ``hold_s``, while later ones pass.
        corrupt: that one bit of its payload is flipped.
        hold_s: seconds.
    """

    toward: Toward
    topics: str = "#"
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    hold_s: float = 0.05


@dataclass(frozen=True)
class Cut:
    """The end of a connection after so many bytes or PUBLISH packets, drawn anew for each connection.

    Attributes:
        toward: which way they go that are counted.
        unit: what is counted.
        least: the smallest number after which it is cut.
        most: the largest.
        topics: a topic filter: which PUBLISH packets count.
        share: probability that a connection is cut at all.
        silent: nobody is told: both ends stay open, and nothing goes through (half-open).
    """

    toward: Toward
    unit: Unit
    least: int
    most: int
    topics: str = "#"
    share: float = 1.0
    silent: bool = False


@dataclass(frozen=True)
class Script:
    """What the proxy does.

    Attributes:
        delay_s: every packet is late by this.
        jitter_s: and by up to this in addition, without changing the order.
        troubles: of PUBLISH packets; each is asked.
        cuts: of connections made while this script holds.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    troubles: tuple[Trouble, ...] = ()
    cuts: tuple[Cut, ...] = ()


CALM = Script()
