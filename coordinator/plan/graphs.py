"""Everything a task's plan is made from, exported but not yet verified."""

from dataclasses import dataclass

from coordinator.plan.evaluation_graph import EvaluationGraph, export_evaluation_graph
from coordinator.plan.joint_graph import JointGraph, trace
from coordinator.plan.optimizer_step import OptimizerRecipe, check_optimizer, read_optimizer
from coordinator.plan.task import Task, check_task
from coordinator.plan.train_graph import TrainGraph, export_train_graph


@dataclass(frozen=True)
class Graphs:
    """What was traced, and the two ONNX graphs it became.

    Attributes:
        joint: forward and backward pass as traced, with the initial parameters and buffers.
        recipe: the optimizer.
        train: one step.
        evaluation: the model in evaluation mode.
        tensor_names: what the graphs call inputs and targets: ``x0`` … and, if there are targets, ``y``.
    """

    joint: JointGraph
    recipe: OptimizerRecipe
    train: TrainGraph
    evaluation: EvaluationGraph
    tensor_names: tuple[str, ...]


def export_graphs(task: Task) -> Graphs:
    """Trace, differentiate, add the optimizer and export.

    Raises:
        PlanRejected: one of these is impossible; the text says what to change.
    """
    check_task(task)
    check_optimizer(task.optimizer)
    joint = trace(task)
    own = dict(task.model.named_parameters())
    recipe = read_optimizer(task.optimizer, {id(own[name]): name for name in joint.parameters})
    names = [f"x{index}" for index in range(len(task.inputs))] + ["y"]
    names = names[: len(task.tensors)]
    return Graphs(
        joint,
        recipe,
        export_train_graph(joint, recipe, task.tensors, names),
        export_evaluation_graph(task, joint, names),
        tuple(names),
    )
