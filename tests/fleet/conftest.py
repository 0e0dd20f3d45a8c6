"""One small plan for all whole-fleet tests, and a place where their broker and fleet live."""

import hashlib
import os
import sys
from pathlib import Path

import pytest
from sklearn.datasets import load_digits
from whole_fleet import Digits, make_digits

REPOSITORY = Path(__file__).parents[2]
# The table of hostile updates serves the coordinator's own tests and these.
sys.path.append(str(REPOSITORY / "tests" / "coordinator"))

_MAKES_THE_PLAN = ("coordinator/plan/*.py", "edge_agent/plan_*.py", "fedtide/wire/plan.py")


def _build_plan(path):
    """An MLP 64-16-10 with plain SGD; torch is imported only where the plan is not in pytest's cache yet."""
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    from coordinator.plan.build import build  # noqa: PLC0415
    from coordinator.plan.file import save  # noqa: PLC0415
    from coordinator.plan.task import Task  # noqa: PLC0415
    from fedtide.wire.training import Training  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    task = Task(
        model=model,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        example=(torch.zeros(8, 64), torch.zeros(8, dtype=torch.int64)),
        name="digits",
        metric="accuracy",
        training=Training(local_epochs=2, batch_size=32, learning_rate=0.1),
    )
    save(build(task), path)


@pytest.fixture(scope="session")
def digits(request) -> Digits:
    """The plan and the examples. Building takes ten seconds, so the file is kept until its makers change."""
    sources = sorted(file for pattern in _MAKES_THE_PLAN for file in REPOSITORY.glob(pattern))
    content = b"".join(file.read_bytes() for file in [*sources, Path(__file__)])
    folder = request.config.cache.mkdir(f"fedtide-plan-{hashlib.sha256(content).hexdigest()[:16]}")
    path = Path(str(folder)) / "digits.plan"
    if not path.exists():
        own = path.with_suffix(f".{os.getpid()}")  # two processes may run these tests at once
        _build_plan(own)
        own.replace(path)
    examples = load_digits()
    return make_digits(path, examples.data / 16, examples.target)
