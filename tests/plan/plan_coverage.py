"""What ``docs/plan-coverage.md`` lists: every case, how it is built, measured and written down."""

import importlib.util
import inspect
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from coordinator.plan.file import BuiltPlan
from coordinator.plan.loss_module import LossModule, trained_copy
from coordinator.plan.task import Task
from edge_agent.dataset import Dataset
from edge_agent.plan_runtime import Trainer

REPOSITORY = Path(__file__).parents[2]
TABLE = REPOSITORY / "docs" / "plan-coverage.md"
STEPS = 10
MEASURED_S = 0.4


def _examples() -> Any:
    path = REPOSITORY / "docs" / "examples" / "models.py"
    specification = importlib.util.spec_from_file_location("example_models", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


MODELS = _examples()


@dataclass(frozen=True)
class Case:
    """One row: what is in the plan, and how its task is made."""

    model: str
    optimizer: str
    loss: str
    options: str
    task: Callable[[], Task]

    @property
    def name(self) -> str:
        return f"{self.model} / {self.optimizer} / {self.loss} / {self.options}"


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD, Nesterov, weight decay": lambda p: torch.optim.SGD(
        p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "RMSprop, centered, momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
}
FOR_EVERY_MODEL = ("SGD", "SGD, momentum", "AdamW")


def classes() -> Tensor:
    return torch.randint(0, 10, (32,))


def numbers() -> Tensor:
    return torch.randn(32, 10)


def yes_or_no() -> Tensor:
    return torch.randint(0, 2, (32, 10)).float()


LOSSES: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
    "cross-entropy, fixed weights": (nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10)), classes),
    "cross-entropy, label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), classes),
    "cross-entropy, ignore_index": (nn.CrossEntropyLoss(ignore_index=3), classes),
    "MSE": (nn.MSELoss(), numbers),
    "BCE with logits": (nn.BCEWithLogitsLoss(), yes_or_no),
    "BCE with logits, pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.linspace(0.5, 3, 10)), yes_or_no),
    "SmoothL1": (nn.SmoothL1Loss(), numbers),
    "Huber": (nn.HuberLoss(delta=0.5), numbers),
}


def weighted_cross_entropy(output: Tensor, targets: Tensor, class_weights: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, targets, weight=class_weights)


def _task(
    make: Callable[[], Any],
    optimizer: str,
    loss: Any = None,
    targets: Callable[[], Tensor] | None = None,
    **options: Any,
) -> Task:
    """The task of one case; the same at each call."""
    torch.manual_seed(0)
    model, inputs, own_targets, own_loss = make()
    return Task(
        name="coverage",
        model=model,
        loss=own_loss if loss is None else loss,
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        example=(inputs, own_targets if targets is None else targets()),
        **options,
    )


def _with_dropout() -> Any:
    layers, inputs, targets, loss = MODELS.mlp()
    return nn.Sequential(layers[:2], nn.Dropout(0.25), layers[2:]), inputs, targets, loss


def _with_channel_dropout() -> Any:
    layers, inputs, targets, loss = MODELS.lenet()
    return nn.Sequential(layers[:2], nn.Dropout2d(0.25), layers[2:]), inputs, targets, loss


def _frozen() -> Any:
    layers, inputs, targets, loss = MODELS.mlp()
    layers[0].requires_grad_(requires_grad=False)
    return layers, inputs, targets, loss


def _large_frozen() -> Any:
    """A frozen layer of 320 KiB, which does not fit into the graphs and travels with the model."""
    frozen = nn.Linear(64, 1280).requires_grad_(requires_grad=False)
    model = nn.Sequential(frozen, nn.ReLU(), nn.Linear(1280, 10))
    return model, (torch.randn(32, 64),), classes(), nn.CrossEntropyLoss()


class Tied(nn.Module):
    """Predicts a token from the tokens before it; embedding and output layer are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))


def _tied() -> Any:
    return Tied(), (torch.randint(0, 50, (32, 6)),), torch.randint(0, 50, (32,)), nn.CrossEntropyLoss()


def groups() -> Task:
    task = _task(MODELS.mlp, "AdamW")
    layers = task.model
    parts = [
        {"params": layers[0].parameters(), "lr": 1e-3},
        {"params": layers[2:].parameters(), "lr": 2e-3, "weight_decay": 0.1},
    ]
    return Task(task.model, task.loss, torch.optim.AdamW(parts), task.example, "groups")


OPTIONS: dict[str, tuple[str, str, Callable[[], Task]]] = {
    "dropout": ("MLP", "SGD", lambda: _task(_with_dropout, "SGD")),
    "dropout of channels": ("LeNet", "SGD", lambda: _task(_with_channel_dropout, "SGD")),
    "frozen layer": ("MLP", "SGD", lambda: _task(_frozen, "SGD")),
    "frozen layer of 320 KiB": ("MLP", "SGD", lambda: _task(_large_frozen, "SGD")),
    "parameter groups": ("MLP", "AdamW", groups),
    "shared parameter": ("embedding", "SGD, momentum", lambda: _task(_tied, "SGD, momentum")),
    "accuracy": ("MLP", "SGD", lambda: _task(MODELS.mlp, "SGD", metric="accuracy")),
    "proximal term": ("MLP", "SGD, momentum", lambda: _task(MODELS.mlp, "SGD, momentum", proximal=True)),
    "clipping": ("MLP", "SGD, momentum", lambda: _task(MODELS.mlp, "SGD, momentum", clip_norm=0.1)),
    "proximal term, clipping": (
        "LeNet, batch normalisation",
        "AdamW",
        lambda: _task(MODELS.lenet_batch_norm, "AdamW", proximal=True, clip_norm=0.1),
    ),
    "class weights": (
        "MLP",
        "SGD",
        lambda: _task(MODELS.mlp, "SGD", weighted_cross_entropy, class_weights=10),
    ),
    "local buffers": (
        "1-D CNN",
        "SGD",
        lambda: _task(MODELS.sensor_cnn, "SGD", buffers="local"),
    ),
}


def _own_loss(family: Any) -> str:
    return "MSE" if "autoencoder" in family.name else "cross-entropy"


def _cases() -> Iterator[Case]:
    for family in MODELS.FAMILIES:
        for optimizer in FOR_EVERY_MODEL:
            make = family.make
            yield Case(family.name, optimizer, _own_loss(family), "", lambda m=make, o=optimizer: _task(m, o))
    for optimizer in [name for name in OPTIMIZERS if name not in FOR_EVERY_MODEL]:
        yield Case("MLP", optimizer, "cross-entropy", "", lambda o=optimizer: _task(MODELS.mlp, o))
    for name, (loss, targets) in LOSSES.items():
        yield Case(
            "MLP", "SGD", name, "", lambda chosen=loss, given=targets: _task(MODELS.mlp, "SGD", chosen, given)
        )
    for name, (model, optimizer, task) in OPTIONS.items():
        yield Case(model, optimizer, "cross-entropy", name, task)


CASES = list(_cases())

_HEAD = """# Which models have been built into training plans

Each row was built with `fedtide`, accepted by the check of 20 steps against float64 torch, and accepted by
the device's guard. Errors are the largest difference of any gradient, as a part of the largest gradient;
"torch" is float32 torch's own. Batches of 32, 7 and 1 go through the same graph (32, 7 and 5 with batch
normalisation). Speed is steps with batches of 32 per CPU second, one thread, and how many times torch's own;
measured coarsely on a machine with other work, so read it as "about". "Plan" is both graphs, compressed.

Written by `FEDTIDE_WRITE_COVERAGE=1 pytest tests/plan/test_plan_coverage.py`; without the variable that
test checks that the table lists what is tested, and that each row still builds (a few in every run, the rest
with `-m long`).

| model | optimizer | loss | option | error, median | error, max | torch, max | steps/s | times torch | plan |
|---|---|---|---|---|---|---|---|---|---|
"""


def row(case: Case, built: BuiltPlan, task: Task) -> str:
    """The line of the table, figures measured now."""
    verified = built.plan.manifest.verified
    plan_speed, torch_speed = plan_steps_per_s(built, task), torch_steps_per_s(task)
    packed = sum(len(zlib.compress(graph, 9)) for graph in (built.plan.train, built.plan.evaluation))
    columns = (
        case.model,
        case.optimizer,
        case.loss,
        case.options,
        f"{verified.median_gradient_error:.1e}",
        f"{verified.max_gradient_error:.1e}",
        f"{verified.torch_float32_max_error:.1e}",
        f"{plan_speed:,.0f}",
        f"{plan_speed / torch_speed:.2g}",
        f"{packed:,} B",
    )
    return f"| {' | '.join(columns)} |"


def plan_steps_per_s(built: BuiltPlan, task: Task) -> float:
    """Steps per CPU second on a device's runtime, one thread."""
    arrays = [np.concatenate([tensor.numpy()] * STEPS) for tensor in task.tensors]
    inputs = tuple(arrays[: len(task.inputs)])
    dataset = Dataset(inputs, arrays[-1] if task.example[1] is not None else None)
    trainer, rng = Trainer(built.plan), np.random.default_rng(0)
    training = msgspec.structs.replace(
        built.plan.manifest.training, batch_size=len(task.tensors[0]), learning_rate=1e-4
    )
    return _per_s(lambda: trainer.run_epochs(built.initial, dataset, training, rng))


def torch_steps_per_s(task: Task) -> float:
    """The same for torch's own loop over a batch that is ready."""
    module = LossModule(trained_copy(task).train(), task)
    kind: Any = type(task.optimizer)
    known = set(inspect.signature(kind).parameters) - {"params"}
    settings = {k: v for k, v in task.optimizer.param_groups[0].items() if k in known}
    optimizer = kind([p for p in module.parameters() if p.requires_grad], **settings | {"lr": 1e-4})

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            module(task.loss_arguments)[0].backward()
            optimizer.step()

    return _per_s(steps)


def _per_s(run: Callable[[], object]) -> float:
    """How many of the :data:`STEPS` of each run a CPU second holds, the first run not counted."""
    run()
    begin, runs = time.process_time(), 0
    while (taken := time.process_time() - begin) < MEASURED_S:
        run()
        runs += 1
    return STEPS * runs / taken


def listed() -> dict[str, str]:
    """The lines of the table by the name of their case."""
    if not TABLE.exists():
        return {}
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")][2:]
    return {" / ".join(cell.strip() for cell in line.split("|")[1:5]): line for line in lines}


def write(rows: dict[str, str]) -> None:
    """Put these lines into the table, in the order of the cases; those of other cases stay."""
    lines = listed() | rows
    TABLE.write_text(_HEAD + "\n".join(lines[case.name] for case in CASES if case.name in lines) + "\n")
