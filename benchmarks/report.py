"""What every benchmark shares: the one JSON line, and CPU and memory of processes as Linux counts them."""

import hashlib
import json
import os
import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
"""Resolution of :func:`cpu_seconds`, usually 10 ms."""


@dataclass(frozen=True)
class Target:
    """One figure and the bound it is held to.

    Attributes:
        name: what is bounded, with its unit.
        value: measured; None where the run did not get so far.
        bound: the limit.
        at_most: whether the bound is an upper one.
    """

    name: str
    value: float | None
    bound: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        """Whether it was measured and within its bound."""
        if self.value is None:
            return False
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def print_report(claim: str, targets: Sequence[Target], **figures: object) -> None:
    """Print the last line of a benchmark: one JSON object.

    Args:
        claim: one sentence.
        targets: what it is held to; the claim holds if all of them do.
        figures: everything behind them.
    """
    line = {
        "claim": claim,
        "measured": {target.name: _rounded(target.value) for target in targets},
        "target": {f"{target.name} {'<=' if target.at_most else '>='}": target.bound for target in targets},
        "missed": [target.name for target in targets if not target.holds],
        "holds": all(target.holds for target in targets),
        "sha256_1_mb_cpu_ms": _rounded(sha256_ms()),
        **{name: _rounded(figure) for name, figure in figures.items()},
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)


def sha256_ms() -> float:
    """Median CPU milliseconds to hash 1 MB: how fast this processor is just now.

    0.5 with SHA instructions, 2.6 without them at 2.5 GHz; twice that while a neighbour uses the same core.
    """
    content = bytes(1_000_000)
    times_ms = []
    for _ in range(15):
        before = own_cpu_seconds()
        hashlib.sha256(content)
        times_ms.append((own_cpu_seconds() - before) * 1000)
    return statistics.median(times_ms)


def cpu_seconds(pid: int) -> float:
    """User and system CPU seconds of a process and its threads; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) * TICK_S  # utime and stime, proc(5) fields 14 and 15


def peak_rss_mb(pid: int | str = "self") -> float:
    """Peak resident memory of a process in MB of 10⁶ bytes (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024 / 1e6
    raise ValueError(f"process {pid} has no VmHWM: it is a kernel thread or has ended")


def own_cpu_seconds() -> float:
    """User and system CPU seconds of this process, all threads, in microseconds' resolution."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _rounded(figure: object) -> object:
    """Four significant digits, in lists and dicts too."""
    match figure:
        case float():
            return float(f"{figure:.4g}")
        case dict():
            return {name: _rounded(value) for name, value in figure.items()}
        case list() | tuple():
            return [_rounded(value) for value in figure]
        case _:
            return figure
