"""Evaluating beside the event loop, with an evaluator that is made anew only when the plan has changed."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Evaluation, Evaluator
from fedtide.wire.ids import PlanId
from fedtide.wire.parameters import Vector
from fedtide.wire.plan import Plan


class Evaluate(Protocol):
    """Evaluates parameters on examples.

    Raises:
        PlanRefused: the device will not run the plan.
        StepFailed: onnxruntime stopped a run.
        ValueError: the examples do not fit the plan.
    """

    async def __call__(self, plan: Plan, parameters: Vector, dataset: Dataset) -> Evaluation:
        """Mean loss and metric."""


@dataclass
class InAThread:
    """Evaluates in a thread, so that the connection stays alive. One evaluation at a time.

    Attributes:
        memory_bytes: lowers the plan's own limit of working memory.
        leave_plan: called with the plan and a sentence when the plan does not stop.
    """

    memory_bytes: int | None = None
    leave_plan: Callable[[PlanId, str], None] | None = None
    _evaluator: Evaluator | None = field(default=None, repr=False)

    async def __call__(self, plan: Plan, parameters: Vector, dataset: Dataset) -> Evaluation:
        """See :class:`Evaluate`."""
        return await asyncio.to_thread(self._evaluate, plan, parameters, dataset)

    def _evaluate(self, plan: Plan, parameters: Vector, dataset: Dataset) -> Evaluation:
        if self._evaluator is None or self._evaluator.plan.id != plan.id:
            give_up = None if self.leave_plan is None else partial(self.leave_plan, plan.id)
            self._evaluator = Evaluator(plan, memory_bytes=self.memory_bytes, give_up=give_up)
        return self._evaluator.evaluate(parameters, dataset)
