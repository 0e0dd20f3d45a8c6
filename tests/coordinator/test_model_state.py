"""The global model under its entries: closing a buffer, and changing the rules."""

import pytest
from small_fleet import vector

from coordinator.aggregation import FedBuff
from coordinator.model_state import change_rules, close_buffer, fold_update, initial_state
from coordinator.server_optimizers import SGD, Adam, Momentum, Yogi
from coordinator.settings import Rules

START = vector(1.0, 2.0)


def rules(goal=2, optimizer=None):
    return Rules(aggregator=FedBuff(goal=goal), server_optimizer=optimizer or SGD())


def fold(state, *numbers, weight=1.0):
    return fold_update(state, vector(*numbers), weight, 1.0, None)


def test_version_zero_holds_the_parameters_it_is_given():
    state = initial_state(START, rules())
    assert state.version == 0
    assert state.parameters.tolist() == [1.0, 2.0]
    assert (state.buffer.count, state.buffer.divisor) == (0, 0.0)


def test_an_update_below_the_goal_changes_only_the_buffer():
    state = fold(initial_state(START, rules()), 4.0, 8.0)
    assert state.version == 0
    assert state.parameters.tolist() == [1.0, 2.0]
    assert state.buffer.total.tolist() == [4.0, 8.0]


def test_the_update_that_reaches_the_goal_makes_the_next_version():
    state = fold(fold(initial_state(START, rules()), 4.0, 8.0), 2.0, 4.0)
    assert state.version == 1
    # (4 + 2) / 2 = 3 and (8 + 4) / 2 = 6
    assert state.parameters.tolist() == [4.0, 8.0]
    assert state.buffer.count == 0
    assert state.buffer.total.tolist() == [0.0, 0.0]


def test_closing_an_empty_buffer_changes_nothing():
    state = initial_state(START, rules())
    assert close_buffer(state) is state


def test_closing_a_partly_full_buffer_divides_by_what_is_in_it():
    state = close_buffer(fold(initial_state(START, rules(goal=10)), 4.0, 8.0))
    assert state.version == 1
    assert state.parameters.tolist() == [5.0, 10.0]


def test_new_rules_close_the_buffer_under_the_old_ones():
    half = SGD(learning_rate=0.5)
    state = change_rules(fold(initial_state(START, rules()), 4.0, 8.0), rules(optimizer=half))
    # learning rate 1 still: (1 + 4, 2 + 8)
    assert state.version == 1
    assert state.parameters.tolist() == [5.0, 10.0]
    assert state.rules.server_optimizer == half


def test_new_rules_on_an_empty_buffer_make_no_version():
    assert change_rules(initial_state(START, rules()), rules(goal=5)).version == 0


def test_an_optimizer_with_the_same_memory_keeps_it():
    momentum = Momentum(learning_rate=1.0, momentum=0.5)
    state = fold(initial_state(START, rules(goal=1, optimizer=momentum)), 4.0, 8.0)
    changed = change_rules(state, rules(goal=1, optimizer=Momentum(learning_rate=0.1, momentum=0.9)))
    assert changed.optimizer.vectors[0].tolist() == [4.0, 8.0]


def test_adams_memory_serves_yogi():
    state = fold(initial_state(START, rules(goal=1, optimizer=Adam())), 4.0, 8.0)
    changed = change_rules(state, rules(goal=1, optimizer=Yogi()))
    for kept, before in zip(changed.optimizer.vectors, state.optimizer.vectors, strict=True):
        assert kept is before


@pytest.mark.parametrize("optimizer", [SGD(), Adam()], ids=["sgd", "adam"])
def test_an_optimizer_with_another_memory_starts_anew(optimizer):
    state = fold(initial_state(START, rules(goal=1, optimizer=Momentum())), 4.0, 8.0)
    changed = change_rules(state, rules(goal=1, optimizer=optimizer))
    assert changed.optimizer.names == optimizer.state_names
    for vector_, fresh in zip(changed.optimizer.vectors, optimizer.init(2).vectors, strict=True):
        assert vector_.tolist() == fresh.tolist()


def test_before_the_first_version_there_is_no_memory_to_keep():
    """Adam starts with v = adaptivity²: rules that never made a version must leave no trace of themselves."""
    state = initial_state(START, rules(optimizer=Adam(adaptivity=1.0)))
    changed = change_rules(state, rules(optimizer=Adam(adaptivity=0.5)))
    assert changed.optimizer.vectors[1].tolist() == [0.25, 0.25]
