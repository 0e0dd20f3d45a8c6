"""A plan of 280 parameters, and a trainer that stands for its graphs, which nobody runs."""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from fleet_witness import DeviceRecord

from coordinator.plan.file import BuiltPlan
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import LocalResult
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, TensorSpec, Vector
from fedtide.wire.plan import Limits, Plan, PlanManifest, Verified
from fedtide.wire.training import Training

EXAMPLES: Final = Dataset((np.ones((5, 8), np.float32),), np.zeros((5, 1), np.float32))


def _float32(name: str, *shape: int | None) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def small_plan() -> BuiltPlan:
    """A plan of 280 parameters whose graphs nobody runs."""
    train, evaluation = b"train graph", b"evaluation graph"
    schema = Schema(tensors=(_float32("p.weight", 16, 16), _float32("p.bias", 24)))
    manifest = PlanManifest(
        format=1,
        name="simulated",
        opset=20,
        producer="by hand",
        min_onnxruntime="1.23",
        schema=schema,
        local_state=(),
        local_buffers=(),
        inputs=(_float32("x0", None, 8),),
        targets=_float32("y", None, 1),
        learning_rate_input="rate",
        min_batch=1,
        train_outputs=("p.weight'", "p.bias'", "loss"),
        evaluation_state=("p.weight", "p.bias"),
        metric=None,
        optimizer="SGD",
        operators=("Add",),
        training=Training(),
        limits=Limits(),
        verified=Verified(
            steps=1, median_gradient_error=0.0, max_gradient_error=0.0, torch_float32_max_error=0.0
        ),
        train_sha256=hashlib.sha256(train).digest(),
        evaluation_sha256=hashlib.sha256(evaluation).digest(),
    )
    initial = np.linspace(-1.0, 1.0, schema.size, dtype=np.float32)
    return BuiltPlan(Plan(manifest, train, evaluation), initial)


PLAN: Final = small_plan()


@dataclass
class Pull:
    """A trainer that takes a fifth of the way to where it wants the model, and some noise.

    Attributes:
        target: where it wants every parameter.
        record: is told what is trained on.
    """

    target: float
    record: DeviceRecord

    def run_epochs(
        self,
        parameters: Vector,
        dataset: Dataset,
        _training: Training,
        rng: np.random.Generator,
        *,
        version: ModelVersion,
        **_more: object,
    ) -> LocalResult:
        self.record.trains_on(version, parameters)
        noise = rng.standard_normal(parameters.size, dtype=np.float32) * np.float32(0.01)
        trained = parameters + (np.float32(self.target) - parameters) * np.float32(0.2) + noise
        return LocalResult(
            trained.astype(np.float32), len(dataset), 1, loss=float(np.abs(trained).mean()), metric=None
        )
