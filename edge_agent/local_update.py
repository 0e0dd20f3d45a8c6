"""One local update: train, take the delta, encode, sign. Pure but for the training itself."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from edge_agent.model_slots import InstalledModel
from edge_agent.plan_runtime import LocalResult
from fedtide.wire import codecs
from fedtide.wire.envelope import UpdateHeader, seal_update
from fedtide.wire.ids import Counter, DeviceId
from fedtide.wire.signatures import SigningKey


class TrainingDiverged(Exception):
    """Local training gave parameters that are not finite; there is nothing to send."""


@dataclass(frozen=True)
class Author:
    """Who signs updates."""

    device: DeviceId
    key: SigningKey


def sealed_update(
    model: InstalledModel, result: LocalResult, author: Author, counter: Counter, now: float
) -> bytes:
    """The signed envelope of what training on ``model`` gave.

    Args:
        model: the base.
        result: of training from its parameters.
        author: who signs.
        counter: reserved for this update.
        now: seconds since 1970, advisory.

    Raises:
        TrainingDiverged: the delta is not finite.
        UnknownCodec: the head asks for a codec that this build does not have.
    """
    head, schema = model.head, model.plan.manifest.schema
    codec = codecs.get(head.update_codec.id)
    with np.errstate(over="ignore", invalid="ignore"):  # found out at once
        delta = np.subtract(result.parameters, model.parameters)
    if not np.isfinite(delta).all():
        raise TrainingDiverged(
            f"training on version {head.version} diverged (loss {result.loss:g}); "
            "a smaller learning rate would help"
        )
    payload = codec.encode(delta, schema)
    measured = {"loss": result.loss, "metric": result.metric}
    header = UpdateHeader(
        fleet=head.fleet,
        plan=head.plan,
        device=author.device,
        counter=counter,
        base_version=head.version,
        base_sha256=head.parameters_sha256,
        codec=codec.codec_id,
        codec_parameters=head.update_codec.parameters,
        num_examples=result.num_examples,
        local_steps=result.steps,
        metrics={
            name: value for name, value in measured.items() if value is not None and math.isfinite(value)
        },
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).digest(),
        created=now,
    )
    return seal_update(header, payload, author.key)
