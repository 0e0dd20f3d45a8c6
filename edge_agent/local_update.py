"""One local update: take the delta, add what is carried, encode, sign. Pure."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from edge_agent.error_feedback import Feedback, corrected
from edge_agent.model_slots import InstalledModel
from edge_agent.plan_runtime import LocalResult
from fedtide.wire import codecs
from fedtide.wire.codecs import Codec
from fedtide.wire.codecs.rate import Rate, rate_of
from fedtide.wire.envelope import UpdateHeader, seal_update
from fedtide.wire.ids import Counter, DeviceId
from fedtide.wire.messages import Head
from fedtide.wire.parameters import Vector
from fedtide.wire.signatures import SigningKey


class TrainingDiverged(Exception):
    """Local training gave parameters that are not finite; there is nothing to send."""


@dataclass(frozen=True)
class Author:
    """Who signs updates."""

    device: DeviceId
    key: SigningKey


@dataclass(frozen=True)
class LocalUpdate:
    """An update, ready for the outbox.

    Attributes:
        envelope: signed.
        feedback: to be durable before the envelope is; None where nothing is carried.
        share: how much of the residual is in it; see ``error_feedback.Corrected``.
    """

    envelope: bytes
    feedback: Feedback | None = None
    share: float = 1.0


def requested(head: Head) -> tuple[Codec, Rate]:
    """The codec and the rate that a head asks for; to be looked at before anything is trained.

    Raises:
        UnknownCodec: this build does not have the codec.
        ValueError: the codec does not have these parameters, or not in this range.
    """
    asked = head.update_codec
    codec = codecs.get(asked.id)
    return codec, rate_of(codec.codec_id, asked.parameters, adjustable=codec.adjustable)


def sealed_update(
    model: InstalledModel,
    result: LocalResult,
    author: Author,
    counter: Counter,
    now: float,
    *,
    residual: Vector | None = None,
) -> LocalUpdate:
    """The signed envelope of what training on ``model`` gave.

    Args:
        model: the base.
        result: of training from its parameters.
        author: who signs.
        counter: reserved for this update.
        now: seconds since 1970, advisory.
        residual: what earlier updates left out, float32 of the schema's shape. It is used up.

    Raises:
        TrainingDiverged: the delta is not finite.
        UnknownCodec, ValueError: as :func:`requested`.
    """
    head = model.head
    codec, rate = requested(head)
    whole = corrected(_delta(model, result), residual)
    payload = codec.encode(whole.vector, model.plan.manifest.schema, whole.request(rate))
    header = UpdateHeader(
        fleet=head.fleet,
        plan=head.plan,
        device=author.device,
        counter=counter,
        base_version=head.version,
        base_sha256=head.parameters_sha256,
        codec=codec.codec_id,
        num_examples=result.num_examples,
        local_steps=result.steps,
        metrics=_metrics(result),
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).digest(),
        created=now,
    )
    # A codec without a rate leaves next to nothing out; but what another one left, it must not lose.
    carries = codec.adjustable or residual is not None
    feedback = Feedback(head.plan, counter, whole.vector, codec.codec_id, payload) if carries else None
    return LocalUpdate(seal_update(header, payload, author.key), feedback, whole.share)


def _delta(model: InstalledModel, result: LocalResult) -> Vector:
    with np.errstate(over="ignore", invalid="ignore"):  # found out at once
        delta = np.subtract(result.parameters, model.parameters)
    if not np.isfinite(delta).all():
        raise TrainingDiverged(
            f"training on version {model.head.version} diverged (loss {result.loss:g}); "
            "a smaller learning rate would help"
        )
    return delta


def _metrics(result: LocalResult) -> dict[str, float]:
    measured = {"loss": result.loss, "metric": result.metric}
    return {name: value for name, value in measured.items() if value is not None and math.isfinite(value)}
