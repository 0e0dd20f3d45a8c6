"""Replay is the recovery: the newest snapshot, then every later entry through the same pure code as live."""

from collections.abc import Callable, Mapping

from coordinator.entries import Entry, FlushEntry, RulesEntry, UpdateEntry
from coordinator.journal import Journal
from coordinator.model_state import ModelState, change_rules, close_buffer, fold_update
from fedtide.wire import codecs
from fedtide.wire.envelope import open_update
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, Vector, fingerprint

Bases = Callable[[ModelVersion], Vector]
"""Gives the parameters of a published version."""


class ReplayMismatch(Exception):
    """Replay gave other parameters than were published."""


def replay(
    journal: Journal,
    state: ModelState,
    sequence: int,
    *,
    schema: Schema,
    bases: Bases,
    on_version: Callable[[ModelState], None] = lambda _state: None,
) -> tuple[int, ModelState]:
    """Apply every entry after ``sequence`` and return the last entry's number and the state after it.

    Args:
        journal: whose entries.
        state: the state after entry ``sequence``.
        sequence: where to begin; 0 for the whole journal.
        schema: of the model.
        bases: for aggregators that need the base version's parameters.
        on_version: told of each new version.

    Raises:
        ReplayMismatch: a version is not the one that was published.
    """
    published = {row.version: row.fingerprint for row in journal.published()}
    number = sequence
    for number, entry in journal.entries_after(sequence):  # noqa: B007 - the last number is returned
        before = state.version
        state = apply_entry(state, entry, schema, bases)
        if state.version != before:
            check_published(state, published)
            on_version(state)
    return number, state


def apply_entry(state: ModelState, entry: Entry, schema: Schema, bases: Bases) -> ModelState:
    """The state after one entry."""
    match entry:
        case UpdateEntry():
            envelope = open_update(entry.envelope, len(entry.envelope))
            delta = codecs.get(envelope.header.codec).decode(envelope.payload, schema)
            base = bases(entry.base_version) if state.rules.aggregator.needs_base else None
            return fold_update(state, delta, entry.staleness_weight, entry.importance, base)
        case FlushEntry():
            return close_buffer(state)
        case RulesEntry():
            return change_rules(state, entry.rules)


def check_published(state: ModelState, published: Mapping[ModelVersion, bytes]) -> None:
    """Compare a replayed version with what devices were offered under its number.

    Raises:
        ReplayMismatch: they differ.
    """
    expected = published.get(state.version)
    if expected is not None and expected != fingerprint(state.parameters):
        raise ReplayMismatch(
            f"replay gives other parameters for version {state.version} than were published: "
            f"expected SHA-256 {expected.hex()}, got {fingerprint(state.parameters).hex()}"
        )
