"""Evidence that a plan computes what torch computes, gathered before anyone trains with it.

The test is teacher-forced: at every step, torch gets the plan's own parameters, so that errors do not add up
along a trajectory, where one flipped ReLU would hide or fake a wrong gradient. Four things are compared:

1. gradients with float64 torch: of the shipped nodes, with gradients made outputs (``TrainGraph.probed``);
2. the step of the shipped graph itself with the task's torch optimizer, given those gradients, to which torch
   adds the proximal term and which torch clips, if the plan does;
3. loss and new buffers of the shipped graph with torch;
4. output and loss of the evaluation graph with torch in evaluation mode.
"""

import copy
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import AttributeProto, ModelProto
from torch import Tensor

from coordinator.plan.evaluation_graph import OUTPUT, EvaluationGraph
from coordinator.plan.export import with_outputs
from coordinator.plan.graphs import Graphs
from coordinator.plan.loss_module import LossModule
from coordinator.plan.optimizer_step import SUPPORTED_OPTIMIZERS
from coordinator.plan.reference import Named, Outcome, Reference
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task
from coordinator.plan.train_graph import LEARNING_RATE, PROXIMAL
from fedtide.wire.plan import Verified

Arrays = dict[str, npt.NDArray[Any]]

STEPS: Final = 20
BATCH_SIZES: Final = (32, 32, 7, 1)
MAX_DRAWS: Final = 20
SMALLEST_NORMALISED_BATCH: Final = 5
"""Below this, a batch's own variance is so uncertain that float32 torch differs from float64 by percents."""
LEARNING_RATE_FACTORS: Final = (1.0, 0.5, 1.0, 2.0)
"""The learning rate changes between steps, so that one baked into the graph would show."""
PROXIMAL_FACTORS: Final = (0.0, 0.01, 1.0)
"""μ changes between steps too, out of step with the learning rate."""
ANCHOR_DISTANCE: Final = 0.1
"""Standard deviation of the anchors around the initial parameters."""
SMALLEST_CLASS_WEIGHT: Final = 0.1
"""Class weights are drawn evenly from here to twice the mean of one, anew for each step."""

MEDIAN_GRADIENT_TOLERANCE: Final = 2e-6
MAX_GRADIENT_TOLERANCE: Final = 1e-5
"""Relative to the largest gradient. Float32 torch stays at 1e-7 except where a ReLU flips."""
ALLOWED_OVER_TORCH: Final = 3.0
"""Where float32 torch itself is far from float64, the plan may be this many times as far."""
ROUNDINGS: Final = 16
ROUNDING: Final = 4e-7
"""Relative; a few times float32's 6e-8, for the roundings of a forward pass add up."""
LARGE_LEARNING_RATE: Final = 1.0
"""Steps are compared at this rate too: at the task's own, a wrong one may be smaller than a rounding."""
STEP_TOLERANCE: Final = 2e-6
"""Relative to the parameters: a few roundings of float32."""
MOVE_TOLERANCE: Final = 1e-4
"""Relative to the move: Adam divides two small numbers, whose roundings show in the quotient."""
EPSILON: Final = 2.0**-23
"""The spacing of float32 below two. A plan has Adam's bias correction 1 - β in float32, torch in float64."""
VALUE_TOLERANCE: Final = 1e-5
"""Of losses, outputs and buffers, relative to one plus their size."""


def verify(task: Task, graphs: Graphs) -> Verified:
    """Run :data:`STEPS` steps of the plan beside torch.

    Raises:
        PlanRejected: they disagree, or the loss does not stay finite; the text says where and by how much.
    """
    comparison = _Comparison(task, graphs)
    smallest = SMALLEST_NORMALISED_BATCH if graphs.joint.batch_normalised else 1
    errors = [comparison.step(step, tensors) for step, tensors in enumerate(_batches(task, smallest))]
    plan_errors, torch_errors = np.array(errors).T
    verified = Verified(
        steps=STEPS,
        median_gradient_error=float(np.median(plan_errors)),
        max_gradient_error=float(plan_errors.max()),
        torch_float32_max_error=float(torch_errors.max()),
    )
    # Each step by its own float32 error: what one step at a corner allows must not hide what others do wrong.
    allowed = np.fmax(MAX_GRADIENT_TOLERANCE, ALLOWED_OVER_TORCH * torch_errors)
    worst = int(np.argmax(plan_errors / allowed))
    if not (verified.median_gradient_error <= MEDIAN_GRADIENT_TOLERANCE and (plan_errors <= allowed).all()):
        raise PlanRejected(
            f"The gradients differ from float64 torch by {verified.median_gradient_error:.1e} (median) "
            f"and {plan_errors[worst]:.1e} (at step {worst}) of the largest gradient over {STEPS} steps; "
            f"{MEDIAN_GRADIENT_TOLERANCE:.0e} and {allowed[worst]:.1e} are allowed. {_advice(task)}"
        )
    comparison.check_evaluation(task, graphs.evaluation)
    return verified


def _advice(task: Task) -> str:
    """What to change where gradients differ."""
    if all(bool((x == x[:1]).all()) for x in task.inputs):
        return (
            "All rows of the example's inputs are alike, which leaves normalisation nothing but roundings to "
            "work on; give an example of real or random values, such as torch.randn(8, 64), not torch.zeros."
        )
    return "A layer of this model or its loss is exported wrongly; use another one."


class _Comparison:
    """The shipped graph's own trajectory, with torch beside it at every step."""

    def __init__(self, task: Task, graphs: Graphs) -> None:
        joint, recipe = graphs.joint, graphs.recipe
        self.recipe = recipe
        self.mask_count = joint.dropouts
        self.shipped = _session(graphs.train.shipped)
        self.far = _session(graphs.train.shipped)  # its own, to draw the same dropout masks
        self.probed = _session(graphs.train.probed)
        self.task = task
        self.learning_rate = task.device_training.learning_rate
        self.precise = Reference(task, torch.float64)
        self.single = Reference(task, torch.float32)
        self.parameters = dict(joint.parameters)
        self.buffers = dict(joint.buffers)
        self.state = dict(recipe.state)
        betas = [beta for group in recipe.groups for beta in group.settings.get("betas", ())]
        self.move_tolerance = max([MOVE_TOLERANCE, *(EPSILON / (1 - beta) for beta in betas)])
        self.names = graphs.tensor_names
        self.anchors = _anchors(joint.parameters) if task.proximal else {}
        self.torch_parameters = [value.clone() for value in joint.parameters.values()]
        self.optimizer = recipe.make(self.torch_parameters, self.learning_rate, traceable=False)

    def step(self, number: int, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
        """Take one step; return the gradient errors of plan and float32 torch, both against float64."""
        factor = LEARNING_RATE_FACTORS[number % len(LEARNING_RATE_FACTORS)]
        feed = {
            **self._feed(tensors),
            **{f"o.{name}": value.numpy() for name, value in self.state.items()},
            LEARNING_RATE: np.full((), self.learning_rate * factor, np.float32),
        }
        mu = PROXIMAL_FACTORS[number % len(PROXIMAL_FACTORS)]
        if self.task.proximal:
            feed[PROXIMAL] = np.full((), mu, np.float32)
            feed |= {f"a.{name}": value.numpy() for name, value in self.anchors.items()}
        after = _run(self.shipped, feed)
        far = _run(self.far, feed | {LEARNING_RATE: np.full((), LARGE_LEARNING_RATE, np.float32)})
        probes = _run(self.probed, feed)
        if not np.isfinite(after["loss"]):
            raise PlanRejected(
                f"The loss became {float(after['loss'])} after {number} steps at learning rate "
                f"{self.learning_rate}; lower the learning rate."
            )
        gradients = {name: torch.from_numpy(probes[f"g.{name}"]) for name in self.parameters}
        masks = [torch.from_numpy(probes[f"mask.{index}"]) for index in range(self.mask_count)]
        precise = self.precise.step(self.parameters, self.buffers, tensors, masks)
        single = self.single.step(self.parameters, self.buffers, tensors, masks)
        self._check_values(number, after, precise, single)
        self._check_step(
            number, {LARGE_LEARNING_RATE: far, self.learning_rate * factor: after}, gradients, mu
        )
        before = self.parameters, self.buffers
        self.parameters, self.buffers, self.state = (
            {name: torch.from_numpy(after[f"{kind}.{name}'"]) for name in held}
            for kind, held in (("p", self.parameters), ("b", self.buffers), ("o", self.state))
        )
        plan_error = _gradient_error(gradients, precise.gradients)
        torch_error = _gradient_error(single.gradients, precise.gradients)
        if plan_error > MAX_GRADIENT_TOLERANCE:
            torch_error = max(torch_error, self._rounding_error(before, tensors, masks, precise))
        return plan_error, torch_error

    def _rounding_error(
        self, held: tuple[Named, Named], tensors: tuple[Tensor, ...], masks: list[Tensor], exact: Outcome
    ) -> float:
        """How far float64 gradients move where parameters move by roundings of float32.

        Not at all, as a rule; but by percents where an activation stands at a corner, such as a ReLU's, so
        closely that every order of summation puts it on its own side. Such a step says nothing of the plan.
        """
        parameters, buffers = held
        generator = torch.Generator().manual_seed(2)
        errors = []
        for _ in range(ROUNDINGS):
            moved = {
                name: value * (1 + ROUNDING * torch.randn(value.shape, generator=generator))
                for name, value in parameters.items()
            }
            found = self.precise.step(moved, buffers, tensors, masks)
            errors.append(_gradient_error(found.gradients, exact.gradients))
        return max(errors)

    def check_evaluation(self, task: Task, evaluation: EvaluationGraph) -> None:
        """Output and loss of the evaluation graph, at the last parameters, against torch."""
        feed = self._feed(task.loss_arguments)
        session = _session(evaluation.model, {name: feed[name] for name in evaluation.injected})
        inputs = {value.name: feed[value.name] for value in session.get_inputs()}
        found = _run(session, inputs)
        precise = self.precise.evaluate(self.parameters, self.buffers, task.loss_arguments)
        single = self.single.evaluate(self.parameters, self.buffers, task.loss_arguments)
        for name, exact, torch_value in zip((OUTPUT, "loss"), precise, single, strict=False):
            error = _distance(torch.from_numpy(found[name]), exact)
            if not error <= _allowed(exact, torch_value):
                raise PlanRejected(f"The evaluation graph's {name} differs from torch's by {error:.1e}.")

    def _feed(self, tensors: tuple[Tensor, ...]) -> Arrays:
        return {
            **{f"p.{name}": value.numpy() for name, value in self.parameters.items()},
            **{f"b.{name}": value.numpy() for name, value in self.buffers.items()},
            **{name: tensor.detach().numpy() for name, tensor in zip(self.names, tensors, strict=True)},
        }

    def _check_values(self, number: int, after: Arrays, precise: Outcome, single: Outcome) -> None:
        """Loss and buffers against float64 torch."""
        pairs = {f"b.{name}'": (precise.buffers[name], single.buffers[name]) for name in self.buffers}
        pairs["loss"] = (torch.tensor(precise.loss, dtype=torch.float64), torch.tensor(single.loss))
        for name, (exact, torch_value) in pairs.items():
            error = _distance(torch.from_numpy(after[name]), exact)
            if not error <= _allowed(exact, torch_value):
                raise PlanRejected(f"At step {number} the plan's {name} differs from torch's by {error:.1e}.")

    def _check_step(self, number: int, found: dict[float, Arrays], gradients: Named, mu: float) -> None:
        """The new parameters against the torch optimizer's, from the same parameters and gradients.

        ``found``: what the plan gave, by learning rate; torch goes on from the last.
        """
        optimizer, parameters = self.optimizer, self.torch_parameters
        for learning_rate, after in found.items():
            self.optimizer, self.torch_parameters = copy.deepcopy((optimizer, parameters))
            self._step_in_torch(learning_rate, gradients, mu)
            for held, (name, before) in zip(self.torch_parameters, self.parameters.items(), strict=True):
                error = _distance(torch.from_numpy(after[f"p.{name}'"]), held)
                allowed = STEP_TOLERANCE * (1 + float(held.abs().max()))
                if not error <= allowed + self.move_tolerance * _distance(held, before):
                    raise PlanRejected(
                        f"Step {number} of the plan's {self.recipe.kind.__name__} takes {name} {error:.1e} "
                        f"away from where torch's takes it at learning rate {learning_rate:g}, which cannot "
                        f"be in a plan; use {SUPPORTED_OPTIMIZERS}."
                    )

    def _step_in_torch(self, learning_rate: float, gradients: Named, mu: float) -> None:
        """One step of the torch optimizer from the plan's parameters, with the plan's gradients."""
        for group, given in zip(self.optimizer.param_groups, self.recipe.groups, strict=True):
            group["lr"] = learning_rate * given.learning_rate_scale
        for held, (name, value) in zip(self.torch_parameters, self.parameters.items(), strict=True):
            held.copy_(value)
            held.grad = gradients[name].clone()
            if name in self.anchors:
                held.grad += mu * (value - self.anchors[name])
        if self.task.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.torch_parameters, self.task.clip_norm)
        self.optimizer.step()


def _batches(task: Task, smallest: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of changing size, rows drawn from the example with a fixed seed, and class weights if any."""
    generator = torch.Generator().manual_seed(0)
    module = LossModule(copy.deepcopy(task.model).eval(), task)
    for step in range(STEPS):
        size = max(smallest, BATCH_SIZES[step % len(BATCH_SIZES)])
        for _ in range(MAX_DRAWS):
            rows = torch.randint(len(task.tensors[0]), (size,), generator=generator)
            tensors = tuple(tensor.detach()[rows] for tensor in task.tensors)
            if task.class_weights is not None:
                spread = torch.rand(task.class_weights, generator=generator)
                tensors = (*tensors, SMALLEST_CLASS_WEIGHT + (2 - SMALLEST_CLASS_WEIGHT) * spread)
            if torch.isfinite(module(tensors)[0]):  # a batch of ignored targets only has no mean
                break
        yield tensors


def _anchors(parameters: Named) -> Named:
    """Where local training might have started: near the initial parameters, with a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + ANCHOR_DISTANCE * torch.randn(value.shape, generator=generator)
        for name, value in parameters.items()
    }


def _session(model: ModelProto, initializers: Arrays | None = None) -> onnxruntime.InferenceSession:
    """Load a graph with fixed dropout seeds: two graphs of the same nodes then draw the same masks."""
    seeded = with_outputs(model, [output.name for output in model.graph.output])
    random = [node for node in seeded.graph.node if node.op_type == "RandomUniformLike"]
    for seed, node in enumerate(random):
        node.attribute.add(name="seed", type=AttributeProto.FLOAT, f=float(seed))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(v) for name, v in (initializers or {}).items()}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    return onnxruntime.InferenceSession(
        seeded.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _run(session: onnxruntime.InferenceSession, feed: Arrays) -> Arrays:
    """All outputs by name, scalars as arrays too."""
    names = [output.name for output in session.get_outputs()]
    return {name: np.asarray(value) for name, value in zip(names, session.run(names, feed), strict=True)}


def _gradient_error(found: Named, exact: Named) -> float:
    """The largest difference of any gradient as a part of the largest gradient."""
    scale = max(float(value.abs().max()) for value in exact.values())
    error = max(_distance(found[name], value) for name, value in exact.items())
    return error / scale if scale > 0 else error


def _allowed(exact: Tensor, torch_value: Tensor) -> float:
    return max(
        VALUE_TOLERANCE * (1 + float(exact.abs().max())), ALLOWED_OVER_TORCH * _distance(torch_value, exact)
    )


def _distance(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference."""
    return float((found.double() - exact.double()).abs().max())
