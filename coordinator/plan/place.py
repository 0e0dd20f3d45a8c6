"""Where in the model owner's code something went wrong, for the text of a rejection.

Only the owner's own lines are shown: not the standard library's, not an installed package's, not ours.
"""

import ast
import linecache
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

import coordinator
import fedtide.wire

_PACKAGES: Final = re.compile(r"[\\/](site|dist)-packages[\\/]")
_ELSEWHERE: Final = tuple(
    str(folder)
    for folder in (
        *{Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")},
        Path(coordinator.__file__ or "").parent,
        Path(fedtide.wire.__file__ or "").parents[1],
    )
)
_FRAME: Final = re.compile(r'File "([^"\n]+)", line (\d+)')
_MAX_LINE: Final = 100


def of_error(error: BaseException) -> str:
    """The innermost line of the owner's code that led to an error or to what caused it; "" if there is none.

    For example ``model.py:14: in Net.forward: `x = x.view(16, 20)```. Where there is no such line, the torch
    layer that was running: ``in layer Linear(in_features=9, out_features=3, bias=True)``.
    """
    chain = list(causes(error))[::-1]
    for cause in chain:
        if place := _last_own(_frames(cause.__traceback__)):
            return place
    return next((layer for cause in chain if (layer := _layer(cause.__traceback__))), "")


def of_stack(text: str) -> str:
    """The same from a stack trace as Python prints it, the innermost call last."""
    return _last_own((path, int(line)) for path, line in _FRAME.findall(text))


def of_frame(frame: FrameType | None) -> str:
    """The same from a running frame and its callers."""
    return _last_own((f.filename, f.lineno or 0) for f in traceback.extract_stack(frame))


def of_line(path: str, line: int) -> str:
    """``path:line: in function: `source```, the path relative to the working directory if it lies in it."""
    shown = Path(path)
    if shown.is_absolute() and shown.is_relative_to(Path.cwd()):
        shown = shown.relative_to(Path.cwd())
    source = linecache.getline(path, line).strip()
    if len(source) > _MAX_LINE:
        source = source[:_MAX_LINE] + " …"
    function = _function(path, line)
    parts = (f"{shown}:{line}", function and f"in {function}", source and f"`{source}`")
    return ": ".join(filter(None, parts))


def of_call(path: Path, name: str) -> str:
    """The first line of a Python file that calls a function or class of this name; "" if none does."""
    for node in ast.walk(_tree(str(path))):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == name:
                return of_line(str(path), node.lineno)
    return ""


def of_function(function: Callable[..., object]) -> str:
    """The first line of a function of the owner's; "" for a module's or one from elsewhere."""
    code = getattr(function, "__code__", None)
    return of_line(code.co_filename, code.co_firstlineno) if code and is_own(code.co_filename) else ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def is_own(path: str) -> bool:
    """Whether a file is the model owner's."""
    return not (path.startswith(("<", *_ELSEWHERE)) or _PACKAGES.search(path))


def _last_own(frames: Iterable[tuple[str, int]]) -> str:
    own = [(path, line) for path, line in frames if is_own(path)]
    return of_line(*own[-1]) if own else ""


def _frames(trace: TracebackType | None) -> list[tuple[str, int]]:
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)]


def _layer(trace: TracebackType | None) -> str:
    """The innermost torch layer of a traceback, as torch prints it."""
    modules = [
        frame.f_locals["self"]
        for frame, _ in traceback.walk_tb(trace)
        if frame.f_code.co_name == "forward" and hasattr(frame.f_locals.get("self"), "extra_repr")
    ]
    if not modules or not type(modules[-1]).__module__.startswith("torch."):
        return ""
    return f"in layer {str(modules[-1]).splitlines()[0]}"


def _function(path: str, line: int) -> str:
    """The dotted name of the innermost class and function around a line."""
    names: list[str] = []
    scope: ast.AST = _tree(path)
    while True:
        inner = next(
            (
                node
                for node in ast.walk(scope)
                if node is not scope
                and isinstance(node, ast.ClassDef | ast.FunctionDef)
                and node.lineno <= line <= (node.end_lineno or node.lineno)
            ),
            None,
        )
        if inner is None:
            return ".".join(names)
        names.append(inner.name)
        scope = inner


def _tree(path: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])
