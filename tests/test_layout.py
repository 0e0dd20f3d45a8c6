"""The architecture's rules, read from the code: who imports whom, and what the pure core may not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = ("fedtide", "coordinator", "edge_agent", "broker_config")

PURE: Final = (
    *(f"fedtide/wire/{name}.py" for name in (
        "ids", "frame", "messages", "model_blob", "envelope", "chunks", "topics", "parameters", "plan",
        "seal", "errors", "packets",
        "codecs/__init__", "codecs/base", "codecs/float16", "codecs/float32", "codecs/q8", "codecs/rate",
        "codecs/budget", "codecs/entropy/bits", "codecs/entropy/rans", "codecs/entropy/tokens",
        "codecs/entropy/table_choice", "codecs/entropy/nonzeros", "codecs/entropy/coefficients",
        "codecs/matrix_contexts", "codecs/ecsq", "codecs/grid",
        "codecs/lowrank/codec", "codecs/lowrank/contexts", "codecs/lowrank/costs", "codecs/lowrank/encoder",
        "codecs/lowrank/factors", "codecs/lowrank/layout", "codecs/lowrank/products",
        "codecs/lowrank/quantiser", "codecs/lowrank/scalars", "codecs/lowrank/stream",
    )),
    *(f"coordinator/{name}.py" for name in (
        "admission", "staleness", "aggregation", "server_optimizers", "model_state", "marks", "accounting",
        "entries", "intake", "writer", "fleet_view", "federated", "release_gate", "closed_loop", "model_grid",
        "model_deltas", "model_blobs", "pace", "shares", "poison", "fencing", "rollback", "line",
        "journal/correction", "journal/facts", "journal/format", "journal/ledger", "journal/snapshot",
    )),
    *(f"edge_agent/{name}.py" for name in (
        "local_update", "error_feedback", "dataset", "hold_out", "plan_guard", "values", "windows",
        "readings", "data_sources/fitting", "model_path", "coordinator_view", "turn", "answers",
        "checked_file", "slot_file",
    )),
)  # fmt: skip
"""Modules without I/O, clock, randomness or waiting: everything comes in as an argument."""

IMPURE: Final = frozenset(
    {"asyncio", "socket", "sqlite3", "time", "datetime", "random", "secrets", "threading", "subprocess"}
)

TASKS: Final = frozenset({"fedtide/demo/task.py"})
"""What a model owner writes: a torch module, a loss, an optimizer. Imported only to build its plan."""

LONGEST: Final = 350
LONGER: Final = {
    "fedtide/wire/messages.py": "every message on one page: a reader looks for all that travels in one place",
    "fedtide/wire/mqtt.py": "one class over paho's callbacks; cut in two, both halves would share its state",
}
"""Modules of more lines, each with the reason."""


@dataclass(frozen=True)
class Import:
    """One imported name: ``from module import name``, or ``import module`` with an empty name."""

    module: str
    name: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def is_below(self, package: str) -> bool:
        """Whether it is ``package``, something in it, or taken from its parent by name."""
        return f"{self.module}.{self.name}.".startswith(f"{package}.")


def modules(*packages: str) -> list[str]:
    """All modules of the packages, as paths below the repository's root."""
    return sorted(
        str(file.relative_to(ROOT)) for package in packages for file in (ROOT / package).rglob("*.py")
    )


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[Import]:
    """Everything a module imports, in functions too."""
    return frozenset(_imports(module))


def _imports(module: str) -> Iterator[Import]:
    package = Path(module).parent.parts
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*above, *([node.module] if node.module else [])))
            yield from (Import(source, alias.name) for alias in node.names)


def ours(module: str) -> list[Import]:
    return [each for each in imports(module) if each.top in PACKAGES]


def users_of(library: str, *packages: str) -> set[str]:
    return {module for module in modules(*packages) if any(each.top == library for each in imports(module))}


def test_the_rules_see_the_code() -> None:
    assert len(modules(*PACKAGES)) > 60
    assert Import("fedtide.wire.ids", "Counter") in imports("edge_agent/outbox.py")
    assert Import("struct", "") in imports("edge_agent/outbox.py")


@pytest.mark.parametrize("module", modules("fedtide/wire"))
def test_the_wire_imports_neither_side(module: str) -> None:
    assert [each for each in ours(module) if not each.is_below("fedtide.wire")] == []


@pytest.mark.parametrize("module", modules("coordinator", "edge_agent"))
def test_each_side_imports_itself_and_the_wire_only(module: str) -> None:
    side = Path(module).parts[0]
    version = Import("fedtide", "__version__")
    strangers = [
        each
        for each in ours(module)
        if each != version and not each.is_below(side) and not each.is_below("fedtide.wire")
    ]
    assert strangers == []


def test_one_module_imports_the_mqtt_library() -> None:
    assert users_of("paho", *PACKAGES) == {"fedtide/wire/mqtt.py"}


def test_only_plans_are_built_with_torch() -> None:
    builders = users_of("torch", *PACKAGES) | users_of("onnx", *PACKAGES) | users_of("onnxscript", *PACKAGES)
    assert builders
    assert {module for module in builders if not module.startswith("coordinator/plan/")} == TASKS


def test_nothing_in_the_packages_can_unpickle() -> None:
    for library in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
        assert users_of(library, *PACKAGES) == set()


@pytest.mark.parametrize("module", PURE)
def test_the_core_does_no_io_reads_no_clock_and_does_not_wait(module: str) -> None:
    assert {each.top for each in imports(module)} & IMPURE == set()
    waiting = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
    assert [node for node in ast.walk(parsed(module)) if isinstance(node, waiting)] == []


@pytest.mark.parametrize("module", PURE)
def test_the_core_draws_no_randomness_of_its_own_and_opens_no_file(module: str) -> None:
    tree = parsed(module)
    drawn = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in {"np.random", "numpy.random"}
        and node.attr != "Generator"
    ]
    opened = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"open", "print"}
    ]
    assert drawn + opened == []


@pytest.mark.parametrize("module", modules(*PACKAGES))
def test_modules_are_short_or_have_a_reason(module: str) -> None:
    lines = len((ROOT / module).read_text(encoding="utf-8").splitlines())
    assert (lines > LONGEST) == (module in LONGER), f"{module} has {lines} lines"


@pytest.mark.parametrize("module", modules(*PACKAGES))
def test_modules_and_names_avoid_the_words_that_say_nothing(module: str) -> None:
    vague = {"utils", "util", "helpers", "helper", "manager", "handler", "common", "misc"}
    names = {Path(module).stem} | {
        node.name.lower()
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert names & vague == set()


_WITHOUT_THEM: Final = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"{{name}} is not installed on a device", name=name)

sys.meta_path.insert(0, Absent())
import {module}
"""


@pytest.mark.parametrize(
    "module",
    ["edge_agent.agent, edge_agent.simulation", "fedtide.assembly", "fedtide.cli", "fedtide.cli.agent"],
)
def test_a_device_needs_nothing_but_the_agents_own_requirements(module: str) -> None:
    absent = {
        "torch", "onnx", "onnxscript", "safetensors", "rich", "prometheus_client", "sklearn", "scipy",
        "matplotlib", "coordinator", "pytest", "hypothesis",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THEM.format(absent=absent, module=module)],
        check=False, capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
