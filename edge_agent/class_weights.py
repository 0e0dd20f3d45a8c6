"""Weights of the classes in a device's loss, from the device's own labels."""

from typing import Literal

import numpy as np

from edge_agent.dataset import Array
from fedtide.wire.parameters import Vector


def class_weights(choice: Literal["equal", "balanced"], classes: int, targets: Array) -> Vector:
    """One weight per class.

    ``equal``: ones. ``balanced``: ``n / (classes * count)``, so that every class the device has weighs as
    much as the others in sum, ``n`` being the number of labels (King and Zeng, Logistic Regression in Rare
    Events Data, Political Analysis 9, 2001). A class that the device has no example of weighs 1, as in an
    unweighted loss: no label asks for its weight, and where a loss spreads a part of each label over all
    classes (label smoothing), absent ones keep their usual part.

    Args:
        choice: which.
        classes: how many there are.
        targets: integers of any shape. Labels outside 0 … ``classes - 1`` are not counted: a loss ignores
            them, or its step fails.

    Raises:
        ValueError: balanced weights, and the targets are not integers.
    """
    weights = np.ones(classes, np.float32)
    if choice == "equal":
        return weights
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"balanced class weights need class labels as targets, not {targets.dtype}")
    labels = targets[(targets >= 0) & (targets < classes)]
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights[present] = len(labels) / (classes * counts[present])
    return weights
