"""Why a task cannot become a plan: what, where in the owner's code, and what to write instead."""

import re
from typing import Final, Self

from coordinator.plan import place as where


class PlanRejected(Exception):
    """The task cannot become a training plan; the text says where, why, and what to change.

    Attributes:
        reason: why, and what to change.
        place: where in the owner's code, as :mod:`coordinator.plan.place` writes it, or "".
        operator: the torch operator that stands in the way, such as ``aten.i0.default``, or "".
    """

    def __init__(self, reason: str, place: str = "", operator: str = "") -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason = reason
        self.place = place
        self.operator = operator

    def at(self, place: str) -> Self:
        """The same rejection with its place."""
        return type(self)(self.reason, place, self.operator)


class PlanWarning(UserWarning):
    """The task can become a training plan, but at a price that its owner may want to avoid."""


# What torch.export and the ONNX exporter say, and what it means for whoever wrote the model.
_MEANINGS: Final = (
    (
        re.compile(r"specialized it to be a constant \((\d+)\)"),
        (
            "The model fixes the batch size at {0}, but devices use other sizes; "
            "write x.flatten(1) or x.view(x.shape[0], ...), not the number {0} and not len(x), which is "
            "a fixed number here."
        ),
    ),
    (
        re.compile(r"Not all values of \w+ = .*? satisfy the generated guard (.+)"),
        (
            "The model needs a batch size for which `{0}`, but devices use any from 1 up; "
            "let nothing depend on the number of rows."
        ),
    ),
    (
        re.compile(r"data-dependent expression|DataDependent|data-dependent", re.IGNORECASE),
        (
            "The model, loss or metric chooses its path by the values of a tensor, which a graph cannot; "
            "use torch.where in place of `if`, and no .item()."
        ),
    ),
    (
        re.compile(r"dynamic shape operator: (aten\.[a-z_]+)"),
        (
            "{0} gives a tensor whose size depends on values, which a graph of fixed shapes cannot; "
            "keep all rows and multiply by a mask, or use torch.where with three arguments."
        ),
    ),
    (
        re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'"),
        "The torch operator {0} has no ONNX form; use another layer or function.",
    ),
    (
        re.compile(r"No ONNX function found for (\S+)"),
        "The torch operator {0} has no ONNX form; use another layer or function.",
    ),
    (
        re.compile(r"has no gradient lowering: (.+)"),
        "{0}",
    ),
)
_OPERATOR: Final = re.compile(r"target=torch\.ops\.([\w.]+)")


def explain(error: BaseException, doing: str) -> PlanRejected:
    """Turn torch's exception into a rejection.

    Args:
        error: what torch raised; its causes are read too, since the exporter wraps the reason.
        doing: what was being done, for exceptions of unknown meaning, for example ``trace the model``.
    """
    chain = [f"{type(cause).__name__}: {cause}" for cause in where.causes(error)]
    operator = next((found[1] for text in chain if (found := _OPERATOR.search(text))), "")
    place = where.of_error(error)
    for cause in where.causes(error):
        if isinstance(cause, PlanRejected):
            return cause.at(cause.place or place)
    for pattern, meaning in _MEANINGS:
        for text in chain:
            if found := pattern.search(text):
                return PlanRejected(meaning.format(*found.groups()), place, operator)
    return PlanRejected(f"torch could not {doing}: {_first_lines(chain[-1])}", place, operator)


def _first_lines(text: str) -> str:
    """The first 300 characters, on one line."""
    return " ".join(text.split())[:300]
