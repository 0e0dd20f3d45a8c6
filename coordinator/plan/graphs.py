"""Everything a task's plan is made from, exported but not yet verified."""

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.plan.evaluation_graph import EvaluationGraph, export_evaluation_graph
from coordinator.plan.joint_graph import JointGraph, trace
from coordinator.plan.loss_module import LossModule, trained_copy
from coordinator.plan.operator_place import operator_place
from coordinator.plan.optimizer_step import OptimizerRecipe, check_optimizer, read_optimizer
from coordinator.plan.rejection import PlanRejected
from coordinator.plan.task import Task, check_task
from coordinator.plan.train_graph import CLASS_WEIGHTS, TrainGraph, export_train_graph


@dataclass(frozen=True)
class Graphs:
    """What was traced, and the two ONNX graphs it became.

    Attributes:
        joint: forward and backward pass as traced, with the initial parameters and buffers.
        recipe: the optimizer.
        train: one step.
        evaluation: the model in evaluation mode.
        tensor_names: what the graphs call the loss's arguments: ``x0`` …, then ``y`` if there are targets,
            then ``class_weights`` if the loss takes any.
    """

    joint: JointGraph
    recipe: OptimizerRecipe
    train: TrainGraph
    evaluation: EvaluationGraph
    tensor_names: tuple[str, ...]


def _silent(_stage: str) -> None:
    """Report no progress."""


def export_graphs(task: Task, progress: Callable[[str], None] = _silent) -> Graphs:
    """Trace, differentiate, add the optimizer and export.

    Args:
        task: what to build.
        progress: told what begins.

    Raises:
        PlanRejected: one of these is impossible; the text says what to change.
    """
    check_task(task)
    check_optimizer(task)
    progress("tracing the model")
    try:
        joint = trace(task)
        own = dict(task.model.named_parameters())
        recipe = read_optimizer(task.optimizer, {id(own[name]): name for name in joint.parameters})
        inputs = [f"x{index}" for index in range(len(task.inputs))]
        targets = [] if task.example[1] is None else ["y"]
        weights = [] if task.class_weights is None else [CLASS_WEIGHTS]
        progress("exporting the training step")
        train = export_train_graph(task, joint, recipe, [*inputs, *targets, *weights])
        progress("exporting the evaluation")
        evaluation = export_evaluation_graph(task, joint, [*inputs, *targets])
    except PlanRejected as rejected:
        if rejected.place or not rejected.operator:
            raise
        module = LossModule(trained_copy(task).train(), task)
        raise rejected.at(operator_place(rejected.operator, module, task.loss_arguments)) from rejected
    return Graphs(joint, recipe, train, evaluation, (*inputs, *targets, *weights))
