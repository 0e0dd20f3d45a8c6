"""Which line of a model leads to a torch operator, forwards or backwards.

The graph that fails to export no longer knows where its operators came from, so model and loss are run once
more in torch, and the first call of the operator is looked for: in what the code calls, in what torch breaks
that into, and in the gradients, where autograd remembers the line of the forward pass.
"""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from coordinator.plan import place


class _Found(Exception):
    """Carries the place out of torch."""


class _Search(TorchDispatchMode):
    """Runs every operator and stops at the first of a given name."""

    def __init__(self, operator: str, tracker: ModuleTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operator = operator
        self._tracker = tracker

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compare, then run the operator, broken into smaller ones if torch has a rule for that."""
        if str(func) == self._operator:
            raise _Found(self._place())
        if (rule := decomposition_table.get(func)) is not None:
            try:
                with self:
                    rule(*args, **(kwargs or {}))
            except _Found:
                raise
            except Exception:  # noqa: BLE001, S110  (torch's rules are not all made to be run)
                pass
        return func(*args, **(kwargs or {}))

    def _place(self) -> str:
        node: Any = torch._C._current_autograd_node()  # noqa: SLF001  (no public name)
        line = (
            place.of_frame(sys._getframe())  # noqa: SLF001
            if node is None
            else place.of_stack("".join(node.metadata.get("traceback_", ())))
        )
        layer = max(self._tracker.parents, key=lambda name: name.count("."))
        return line or (f"in layer {layer.split('.model.', 1)[1]}" if ".model." in layer else "")


def operator_place(operator: str, module: torch.nn.Module, tensors: tuple[Tensor, ...]) -> str:
    """Where in the owner's code an operator comes from; "" where that cannot be told.

    Args:
        operator: such as ``aten.i0.default``.
        module: a copy of the model with its loss, in training mode: running it changes its buffers.
        tensors: an example batch.
    """
    try:
        with warnings.catch_warnings(), ModuleTracker() as tracker, _Search(operator, tracker):
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly(check_nan=False):
                module(tensors)[0].backward()
    except _Found as found:
        return str(found)
    except Exception:  # noqa: BLE001, S110  (the rejection is complete without a place)
        pass
    return ""
