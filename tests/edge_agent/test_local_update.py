import hashlib
from typing import Final

import numpy as np
import pytest
from agent_world import COORDINATOR_KEY, DEVICE, DEVICE_KEY, FLEET, Release, tiny_plan

from edge_agent.local_update import Author, TrainingDiverged, sealed_update
from edge_agent.model_slots import InstalledModel
from edge_agent.plan_runtime import LocalResult
from fedtide.wire import codecs
from fedtide.wire.envelope import Envelope, UpdateHeader, open_update
from fedtide.wire.errors import BadSignature, UnknownCodec
from fedtide.wire.ids import Counter
from fedtide.wire.parameters import Vector, from_bytes

AUTHOR: Final = Author(DEVICE, DEVICE_KEY)
SCHEMA: Final = tiny_plan().manifest.schema


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def model_of(release: Release, parameters: Vector | None = None) -> InstalledModel:
    return InstalledModel(
        release.head, release.plan, release.parameters if parameters is None else parameters
    )


def update(
    local: Vector, release: Release | None = None, base: Vector | None = None, **measured: float | None
) -> Envelope:
    result = LocalResult(local, 600, 19, **({"loss": 0.5, "metric": 0.75} | measured))  # type: ignore[arg-type]
    sealed = sealed_update(
        model_of(release or Release(4), base), result, AUTHOR, Counter(77), 1_700_000_000.25
    )
    return open_update(sealed, 10_000)


def test_the_delta_is_local_minus_base_so_that_adding_it_gives_the_local_model() -> None:
    envelope = update(vector(4.5, 3.0, 4.0))  # from version 4, whose parameters are 4, 4, 4
    delta = from_bytes(envelope.payload)
    assert delta.tolist() == [0.5, -1.0, 0.0]
    assert (Release(4).parameters + delta).tolist() == [4.5, 3.0, 4.0]


def test_the_header_says_what_was_trained_on_what_and_by_whom() -> None:
    release = Release(4)
    envelope = update(vector(5, 5, 5), release)
    assert envelope.header == UpdateHeader(
        fleet=FLEET,
        plan=release.plan.id,
        device=DEVICE,
        counter=Counter(77),
        base_version=release.head.version,
        base_sha256=release.head.parameters_sha256,
        codec="float32",
        codec_parameters={},
        num_examples=600,
        local_steps=19,
        metrics={"loss": 0.5, "metric": 0.75},
        payload_bytes=12,
        payload_sha256=hashlib.sha256(envelope.payload).digest(),
        mask=None,
        inner=(),
        created=1_700_000_000.25,
    )


def test_the_device_signs_it() -> None:
    envelope = update(vector(5, 5, 5))
    envelope.verify(DEVICE_KEY.public)
    with pytest.raises(BadSignature):
        envelope.verify(COORDINATOR_KEY.public)


@pytest.mark.parametrize("codec_id", codecs.CODECS)
def test_the_head_chooses_the_codec(codec_id: str) -> None:
    envelope = update(vector(4.5, 3.0, 4.0), Release(4, codec=codec_id))
    codec = codecs.get(codec_id)
    delta = vector(0.5, -1.0, 0.0)
    assert envelope.header.codec == codec_id
    assert envelope.payload == codec.encode(delta, SCHEMA)
    assert codec.decode(envelope.payload, SCHEMA) == pytest.approx(delta, abs=1e-2)


def test_a_codec_that_this_build_does_not_have_is_an_error() -> None:
    with pytest.raises(UnknownCodec, match="q2"):
        update(vector(5, 5, 5), Release(4, codec="q2"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_not_sent(value: float) -> None:
    with pytest.raises(TrainingDiverged, match=r"version 4 diverged \(loss nan\)"):
        update(vector(5, value, 5), loss=float("nan"))


def test_a_difference_beyond_float32_is_not_sent() -> None:
    with pytest.raises(TrainingDiverged):
        update(vector(3e38, 0, 0), base=vector(-3e38, 0, 0))


@pytest.mark.parametrize(
    ("loss", "metric", "metrics"),
    [
        (0.5, None, {"loss": 0.5}),
        (float("nan"), 0.75, {"metric": 0.75}),
        (float("inf"), float("nan"), {}),
    ],
)
def test_only_finite_metrics_travel(loss: float, metric: float | None, metrics: dict[str, float]) -> None:
    assert update(vector(5, 5, 5), loss=loss, metric=metric).header.metrics == metrics
