"""The codec ``lowrank``: its parts, and :class:`LowRank`."""

from fedtide.wire.codecs.lowrank.codec import LowRank

__all__ = ["LowRank"]
