"""Update codecs: a delta to bytes and back. The network names a codec of this table; it never adds one.

A new codec is one module with a class that satisfies :class:`Codec`, one entry below, and its golden files in
``tests/golden/codecs``; the tests run on every entry.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fedtide.wire.codecs.base import Codec, NotFinite, WrongLength
from fedtide.wire.codecs.ecsq import Ecsq
from fedtide.wire.codecs.float16 import Float16
from fedtide.wire.codecs.float32 import Float32
from fedtide.wire.codecs.lowrank import LowRank
from fedtide.wire.codecs.q8 import Q8
from fedtide.wire.errors import UnknownCodec

__all__ = ["CODECS", "Codec", "NotFinite", "WrongLength", "get"]

_ALL: Final[tuple[Codec, ...]] = (Float32(), Float16(), Q8(), Ecsq(), LowRank())

CODECS: Final[Mapping[str, Codec]] = MappingProxyType({codec.codec_id: codec for codec in _ALL})
"""Every codec of this build by its id. Closed: the mapping cannot be written to."""


def get(codec_id: str) -> Codec:
    """The codec an envelope names.

    Raises:
        UnknownCodec: it is not in the table; the text lists those that are.
    """
    codec = CODECS.get(codec_id)
    if codec is None:
        raise UnknownCodec(codec_id, tuple(CODECS))
    return codec
