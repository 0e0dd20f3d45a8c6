"""The golden checks can fail: planted defects, each of which made it into a published implementation.

Nine ways in which asynchronous aggregators deviate from the papers they name, and a few neighbours. Each is
planted in place of one piece of the small coordinator of test_aggregation.py, or of one policy of
test_staleness.py, and the golden check for that piece must fail.
"""

import math
from functools import partial

import numpy as np
import pytest
from test_aggregation import (
    check_fedasync_history,
    check_fedavg,
    check_fedbuff_history,
    check_fedbuff_normalised_history,
    check_server_learning_rate,
)
from test_staleness import check_hinge, check_polynomial

from coordinator.aggregation import Buffer, FedAsync, FedAvg, FedBuff
from coordinator.server_optimizers import SGD


class Planted:
    """An aggregator like the real one but for the contribution, its weight, or what is counted of it."""

    def __init__(self, goal):
        self.goal = goal

    def contribution(self, delta, current, base):
        return delta

    def weight(self, staleness_weight, importance):
        return staleness_weight * importance

    def counted(self, staleness_weight, importance):
        return importance

    def fold(self, buffer, delta, *, staleness_weight, importance, current, base):
        return Buffer(
            total=buffer.total
            + np.float32(self.weight(staleness_weight, importance)) * self.contribution(delta, current, base),
            divisor=buffer.divisor + self.counted(staleness_weight, importance),
            count=buffer.count + 1,
        )

    def aggregated_delta(self, buffer):
        return buffer.total / np.float32(buffer.divisor)


class AddsWholeModels(Planted):
    """The device sends its parameters, which are discounted and added: the model grows without bound."""

    def contribution(self, delta, current, base):
        return base + delta


class MixingDecaysForGood(Planted):
    """The staleness weight is multiplied into alpha itself, so that alpha only ever falls."""

    def __init__(self, mixing):
        super().__init__(goal=1)
        self.mixing = mixing

    def contribution(self, delta, current, base):
        return base + delta - current

    def weight(self, staleness_weight, importance):
        self.mixing *= staleness_weight
        return self.mixing


class NoStalenessWeight(Planted):
    """A plain mean of the deltas: stale ones count like fresh ones."""

    def weight(self, staleness_weight, importance):
        return importance


class AveragesStaleModels(Planted):
    """The weighted mean of the devices' models, stale ones and all, replaces the global model."""

    def contribution(self, delta, current, base):
        return base + delta - current

    def counted(self, staleness_weight, importance):
        return staleness_weight * importance


class MeasuresFromTheCurrentModel(Planted):
    """Local minus CURRENT global is summed, not local minus the base the device trained from."""

    def contribution(self, delta, current, base):
        return base + delta - current


class OverwritesTheModel(Planted):
    """No alpha: alpha_t = s(tau), so that a fresh update replaces the global model."""

    def contribution(self, delta, current, base):
        return base + delta - current


class MovesAlongTheDelta(Planted):
    """FedAsync on deltas: the pull back from a stale base towards the local model is lost."""

    def weight(self, staleness_weight, importance):
        return 0.5 * staleness_weight


class DividesByTheStalenessWeights(Planted):
    """The sum of s_i where the paper divides by K."""

    def counted(self, staleness_weight, importance):
        return staleness_weight * importance


class DividesByTheFleet(Planted):
    """The number of devices, here 4, where the paper divides by K."""

    def aggregated_delta(self, buffer):
        return buffer.total / np.float32(4)


class ForgetsTheExamples(Planted):
    """A plain mean where the devices' examples should count."""

    def weight(self, staleness_weight, importance):
        return staleness_weight

    def counted(self, staleness_weight, importance):
        return 1.0


def staleness_since_the_last_report(update, current_version, earlier):
    """Versions since this device was last heard of, so that a retry makes a stale update look fresh."""
    return current_version - earlier.get(update.device, update.base_version)


def staleness_after_the_increment(update, current_version, earlier):
    """The version is counted up first, so that a fresh update has staleness 1."""
    return current_version + 1 - update.base_version


def hinge_with_a_jump(staleness):
    """1 / (a (tau - b + 1)): the one inside the product, so that the curve jumps at the knee."""
    return 1.0 if staleness <= 4 else 1 / (10 * (staleness - 4 + 1))


def one_inside_the_root(staleness):
    """1 / (1 + tau^a) where the paper has (1 + tau)^-a."""
    return 1 / (1 + math.sqrt(staleness))


class IgnoresTheLearningRate(SGD, tag="ignores"):
    """The server learning rate is read from the settings and never used."""

    def apply(self, state, parameters, delta):
        return state, parameters + delta


class SubtractsTheDelta(SGD, tag="subtracts"):
    """The other sign convention, half adopted."""

    def apply(self, state, parameters, delta):
        return state, parameters - delta


NINE_DEFECTS = {
    "whole models are added": partial(check_fedasync_history, AddsWholeModels(goal=1)),
    "alpha decays for good": partial(check_fedasync_history, MixingDecaysForGood(mixing=0.5)),
    "no staleness weight": partial(check_fedbuff_history, NoStalenessWeight(goal=2)),
    "stale models are averaged": partial(check_fedbuff_normalised_history, AveragesStaleModels(goal=2)),
    "deltas are taken from the current model": partial(
        check_fedbuff_history, MeasuresFromTheCurrentModel(goal=2)
    ),
    "staleness is counted from the last report": partial(
        check_fedbuff_history, staleness=staleness_since_the_last_report
    ),
    "staleness is counted after the increment": partial(
        check_fedbuff_history, staleness=staleness_after_the_increment
    ),
    "a fresh update overwrites the model": partial(check_fedasync_history, OverwritesTheModel(goal=1)),
    "the hinge jumps at its knee": partial(check_hinge, hinge_with_a_jump),
}

NEIGHBOURS = {
    "whole models are added to a buffer": partial(check_fedbuff_history, AddsWholeModels(goal=2)),
    "FedAsync moves along the delta": partial(check_fedasync_history, MovesAlongTheDelta(goal=1)),
    "FedAsync counts staleness after the increment": partial(
        check_fedasync_history, staleness=staleness_after_the_increment
    ),
    "FedAsync counts staleness from the last report": partial(
        check_fedasync_history, staleness=staleness_since_the_last_report
    ),
    "FedBuff divides by the staleness weights": partial(
        check_fedbuff_history, DividesByTheStalenessWeights(goal=2)
    ),
    "FedBuff divides by the count when told to normalise": partial(
        check_fedbuff_normalised_history, FedBuff(goal=2)
    ),
    "FedBuff divides by the fleet": partial(check_fedbuff_history, DividesByTheFleet(goal=2)),
    "the polynomial has its one inside the root": partial(check_polynomial, one_inside_the_root),
    "the server learning rate is ignored": partial(
        check_server_learning_rate, IgnoresTheLearningRate(learning_rate=0.5)
    ),
    "the delta is subtracted": partial(check_fedbuff_history, optimizer=SubtractsTheDelta()),
    "FedAvg forgets the examples": partial(check_fedavg, ForgetsTheExamples(goal=2)),
}


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in NINE_DEFECTS.items()])
def test_a_golden_check_fails_on_a_published_defect(check):
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in NEIGHBOURS.items()])
def test_a_golden_check_fails_on_a_neighbouring_defect(check):
    with pytest.raises(AssertionError):
        check()


class HealthyFedAsync(Planted):
    """What FedAsync should do, in the frame of the planted ones."""

    def contribution(self, delta, current, base):
        return base + delta - current

    def weight(self, staleness_weight, importance):
        return 0.5 * staleness_weight


def test_the_frame_of_the_planted_aggregators_is_itself_healthy():
    # So a check that fails above fails for the defect planted, not for the frame around it.
    check_fedasync_history(HealthyFedAsync(goal=1))
    check_fedbuff_history(Planted(goal=2))
    check_fedavg(Planted(goal=2))
    check_fedbuff_normalised_history(DividesByTheStalenessWeights(goal=2))


def test_the_real_pieces_pass_every_check_that_the_planted_ones_fail():
    check_fedasync_history(FedAsync(mixing=0.5))
    check_fedbuff_history(FedBuff(goal=2), optimizer=SGD(learning_rate=1.0))
    check_fedbuff_normalised_history(FedBuff(goal=2, normalise_staleness=True))
    check_server_learning_rate(SGD(learning_rate=0.5))
    check_fedavg(FedAvg(cohort=2))
    check_polynomial()
    check_hinge()
