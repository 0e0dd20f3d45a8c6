"""What the demo was asked for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoSettings:
    """What ``fedtide demo`` was asked for."""

    devices: int
    slow: int
    dropping: int
    seed: int
    alpha: float
    target: float
    seconds: float
    codec: str
    out: Path
    broker: str | None


def kind_of(number: int, settings: DemoSettings) -> str:
    """``slow`` for the first devices, ``dropping`` for the next, ``fast`` for the rest."""
    if number < settings.slow:
        return "slow"
    return "dropping" if number < settings.slow + settings.dropping else "fast"
