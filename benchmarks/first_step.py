"""Runs ``fedtide`` with the given arguments, and tells when training first begins and that it goes on.

Prints the CPU seconds of this process, interpreter start included, at every call of ``Trainer.run_epochs``.
"""

import sys
import time
from typing import Any

from edge_agent.plan_runtime import LocalResult, Trainer
from fedtide.cli import main

_train = Trainer.run_epochs


def _announced(trainer: Trainer, *arguments: Any, **options: Any) -> LocalResult:
    print(f"{time.process_time():.6f}", flush=True)
    return _train(trainer, *arguments, **options)


if __name__ == "__main__":
    Trainer.run_epochs = _announced  # type: ignore[method-assign, assignment]
    sys.argv[0] = "fedtide"
    main()
