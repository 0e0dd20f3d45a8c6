import hashlib
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import COORDINATOR_KEY, DEVICE, DEVICE_KEY, FLEET, Release, tiny_plan
from coarse_codec import TABLE

from edge_agent.local_update import Author, LocalUpdate, TrainingDiverged, requested, sealed_update
from edge_agent.model_slots import InstalledModel
from edge_agent.plan_runtime import LocalResult
from fedtide.wire import codecs
from fedtide.wire.codecs.rate import Rate
from fedtide.wire.envelope import Envelope, UpdateHeader, open_update
from fedtide.wire.errors import BadSignature, UnknownCodec
from fedtide.wire.ids import Counter
from fedtide.wire.messages import CodecRequest, Head
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
    return open_update(made(result, release, base).envelope, 10_000)


def made(
    result: LocalResult,
    release: Release | None = None,
    base: Vector | None = None,
    residual: Vector | None = None,
) -> LocalUpdate:
    model = model_of(release or Release(4), base)
    return sealed_update(model, result, AUTHOR, Counter(77), 1_700_000_000.25, residual=residual)


def result_of(local: Vector) -> LocalResult:
    return LocalResult(local, 600, 19, loss=0.5, metric=0.75)


def asks_for(codec_id: str, **parameters: float) -> Head:
    return msgspec.structs.replace(
        Release(4).head, update_codec=CodecRequest(id=codec_id, parameters=parameters)
    )


@pytest.fixture(autouse=True)
def with_a_coarse_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", TABLE)


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
    if not codec.adjustable:
        assert codec.decode(envelope.payload, SCHEMA) == pytest.approx(delta, abs=1e-2)


def test_a_codec_that_this_build_does_not_have_is_an_error() -> None:
    with pytest.raises(UnknownCodec, match="q2"):
        update(vector(5, 5, 5), Release(4, codec="q2"))


def test_the_head_chooses_the_rate() -> None:
    codec, rate = requested(asks_for("coarse", step=8.0))
    assert (codec.codec_id, rate) == ("coarse", Rate(step=8.0))
    assert requested(asks_for("q8"))[1] == Rate()


@pytest.mark.parametrize(
    ("codec_id", "parameters", "complaint"),
    [
        ("coarse", {"stop": 8.0}, "codec coarse has no parameter 'stop'; it has: step, bits_per_parameter"),
        ("coarse", {"step": 1e9}, r"step = 1e\+09; it must be from 0.000976562 to 64"),
        ("coarse", {"step": float("nan")}, "step = nan; it must be above 0"),
        ("coarse", {"step": 1.0, "bytes_per_update": 9.0}, "step and bytes_per_update are given"),
        ("q8", {"step": 8.0}, "codec q8 has no parameter 'step'; it has: none"),
    ],
)
def test_a_rate_that_the_codec_does_not_have_is_an_error(
    codec_id: str, parameters: dict[str, float], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        requested(asks_for(codec_id, **parameters))


@pytest.mark.parametrize("codec_id", ["float32", "float16", "q8"])
def test_a_codec_without_a_rate_leaves_nothing_to_keep(codec_id: str) -> None:
    assert made(result_of(vector(4.5, 3.0, 4.0)), Release(4, codec=codec_id)).feedback is None


@pytest.mark.parametrize("codec_id", ["float32", "coarse"])
def test_the_residual_goes_with_the_delta_and_both_are_to_be_kept(codec_id: str) -> None:
    release = Release(4, codec=codec_id)
    update = made(result_of(vector(9, 3, 4)), release, residual=vector(1, 1, 1))
    # The delta is 5, -1, 0; with 1, 1, 1 of the updates before that is 6, 0, 1.
    assert update.feedback is not None
    assert update.feedback.vector.tolist() == [6, 0, 1]
    assert (update.feedback.plan, update.feedback.counter) == (release.plan.id, 77)
    assert update.feedback.codec == codec_id
    assert update.feedback.payload == open_update(update.envelope, 10_000).payload
    assert from_bytes(update.feedback.payload).tolist() == ([4, 0, 0] if codec_id == "coarse" else [6, 0, 1])


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
