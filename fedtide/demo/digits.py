"""What the demo trains on: scikit-learn's handwritten digits, split over devices that see few of the ten."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

from edge_agent.dataset import Dataset

_HELD_OUT = 0.2
_FEWEST_EXAMPLES = 8


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8×8 pixels: a held-out part and one part for each device."""

    held_out: Dataset
    devices: tuple[Dataset, ...]


def split_digits(devices: int, alpha: float, rng: np.random.Generator) -> Digits:
    """Hold 20 % out and deal the rest by label.

    Args:
        devices: how many parts.
        alpha: of the Dirichlet distribution over devices, per label (Hsu et al. 2019); 0.3 is far from even.
        rng: draws the split.
    """
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    inputs = (images[order] / 16).astype(np.float32)
    targets = labels[order].astype(np.int64)
    held_out = int(_HELD_OUT * len(order))
    parts = dirichlet_parts(targets[held_out:], devices, alpha, rng)
    rest = Dataset((inputs[held_out:],), targets[held_out:])
    return Digits(Dataset((inputs[:held_out],), targets[:held_out]), tuple(rest.rows(part) for part in parts))


def dirichlet_parts(
    labels: npt.NDArray[np.int64], parts: int, alpha: float, rng: np.random.Generator
) -> list[npt.NDArray[np.intp]]:
    """Deal positions to ``parts``, each label by its own Dirichlet(alpha) shares; every part gets some."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(parts, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(places)).astype(int)
        for part, share in zip(dealt, np.split(places, cuts), strict=True):
            part.extend(share.tolist())
    fewest = min(_FEWEST_EXAMPLES, len(labels) // parts)
    for part in dealt:
        while len(part) < fewest:
            part.append(max(dealt, key=len).pop())
    return [np.array(sorted(part), np.intp) for part in dealt]
