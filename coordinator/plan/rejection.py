"""Why a task cannot become a plan, in one sentence that says what to change."""

import re
from typing import Final


class PlanRejected(Exception):
    """The task cannot become a training plan; the text says what to change."""


# What torch.export and the ONNX exporter say, and what it means for whoever wrote the model.
_MEANINGS: Final = (
    (
        re.compile(r"specialized it to be a constant \((\d+)\)"),
        (
            "The model fixes the batch size at {0}, but devices use other sizes; "
            "write x.flatten(1) or x.view(len(x), ...) in place of the number {0}."
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
        re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'"),
        "The torch operator {0} has no ONNX form; use another layer.",
    ),
    (
        re.compile(r"No ONNX function found for (\S+)"),
        "The torch operator {0} has no ONNX form; use another layer.",
    ),
    (
        re.compile(r"has no gradient lowering: (.+)"),
        "{0}",
    ),
)


def explain(error: BaseException, doing: str) -> PlanRejected:
    """Turn torch's exception into a rejection.

    Args:
        error: what torch raised; its causes are read too, since the exporter wraps the reason.
        doing: what was being done, for exceptions of unknown meaning, for example ``trace the model``.
    """
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    for pattern, meaning in _MEANINGS:
        for text in chain:
            if found := pattern.search(text):
                return PlanRejected(meaning.format(*found.groups()))
    return PlanRejected(f"torch could not {doing}: {_first_lines(chain[-1])}")


def _first_lines(text: str) -> str:
    """The first 300 characters, on one line."""
    return " ".join(text.split())[:300]
