"""A task: which character comes next. A GRU over the last 32 characters, Adam.

The text stays where it was typed: each device has its own author or part, and learns from that. Characters
other than the 64 of ``ALPHABET`` are read as spaces. Run as a script it deals a text file out, its last tenth
held out:

    python docs/examples/characters.py DIRECTORY TEXT [DEVICES]

Then, as in the README: ``fedtide plan build docs/examples/characters.py --out FLEET/model.plan`` and, for
each device, ``fedtide agent init … --data DIRECTORY/device-1.npz``.
"""

import string
import sys
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from coordinator.plan.task import Task
from fedtide.wire.training import Training

ALPHABET: Final = " " + string.ascii_letters + ".,;:!?'\"-()"
CONTEXT: Final = 32
STEP: Final = 3
"""Characters from one example to the next: a smaller step gives more examples that are more alike."""


class NextCharacter(nn.Module):
    """Embedding, one GRU layer, and a score for each character to come."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), 16)
        self.read = nn.GRU(16, hidden, batch_first=True)
        self.score = nn.Linear(hidden, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        """Give logits of shape ``(batch, 64)`` for places in the alphabet, int64 ``(batch, context)``."""
        states, _ = self.read(self.embed(characters))
        logits: Tensor = self.score(states[:, -1])
        return logits


def characters_task(context: int = CONTEXT, hidden: int = 64) -> Task:
    """The task for so many characters of context and so many hidden units."""
    torch.manual_seed(0)
    model = NextCharacter(hidden)
    return Task(
        name="characters",
        model=model,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
        example=(torch.randint(len(ALPHABET), (8, context)), torch.arange(8)),
        metric="accuracy",
        training=Training(local_epochs=1, batch_size=64, learning_rate=0.005),
    )


def task() -> Task:
    """What ``fedtide plan build`` takes."""
    return characters_task()


def examples(text: str, context: int = CONTEXT, step: int = STEP) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and the character after each.

    Returns:
        int64 of shape ``(examples, context)`` and int64 of shape ``(examples,)``, places in the alphabet.

    Raises:
        ValueError: the text is not longer than the context.
    """
    if len(text) <= context:
        raise ValueError(f"a text of {len(text)} characters; it must be longer than the context, {context}")
    places = {character: place for place, character in enumerate(ALPHABET)}
    codes = np.array([places.get(character, 0) for character in text], np.int64)
    rows = np.lib.stride_tricks.sliding_window_view(codes, context + 1)[::step]
    return rows[:, :-1].copy(), rows[:, -1].copy()


def deal(directory: Path, text: str, devices: int) -> None:
    """Cut the text into one part for each device and a tenth held out; arrays ``x`` and ``y``."""
    cut = len(text) * 9 // 10
    bounds = np.linspace(0, cut, devices + 1).astype(int)
    parts = {f"device-{n}": text[bounds[n - 1] : bounds[n]] for n in range(1, devices + 1)}
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in {**parts, "held-out": text[cut:]}.items():
        x, y = examples(part)
        np.savez(directory / f"{name}.npz", x=x, y=y)


if __name__ == "__main__":
    deal(Path(sys.argv[1]), Path(sys.argv[2]).read_text(), int(sys.argv[3]) if len(sys.argv) > 3 else 2)
