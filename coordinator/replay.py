"""Replay is the recovery: the newest snapshot, then every later entry through the same pure code as live."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from coordinator.entries import Entry, FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal.errors import JournalDamaged
from coordinator.journal.history import History
from coordinator.model_state import ModelState, change_rules, close_buffer, fold_update, reset_state
from fedtide.wire import codecs
from fedtide.wire.envelope import open_update
from fedtide.wire.errors import WireError
from fedtide.wire.ids import ModelVersion
from fedtide.wire.parameters import Schema, Vector, fingerprint, from_bytes

Bases = Callable[[ModelVersion], Vector]
"""Gives the parameters of a published version. Raises ``FileNotFoundError`` for one that is not kept."""


class ReplayMismatch(Exception):
    """Replay gave other parameters than were published."""


class _MadeBases:
    """Bases during a replay.

    Versions that it made itself are kept to their last use, because a busy fleet removes their files long
    before the next snapshot. Earlier ones come from where they are kept, perhaps only as devices hold them.
    """

    def __init__(
        self, earlier: Bases, last_uses: Mapping[ModelVersion, int], published: Mapping[ModelVersion, bytes]
    ) -> None:
        self._earlier = earlier
        self._last_uses = last_uses
        self._published = published
        self._made: dict[ModelVersion, Vector] = {}

    def __call__(self, version: ModelVersion) -> Vector:
        if version in self._made:
            return self._made[version]
        parameters = self._earlier(version)
        expected = self._published.get(version)
        if expected is not None and expected != fingerprint(parameters):
            raise FileNotFoundError(f"version {version} is not kept as it was aggregated")
        return parameters

    def note(self, number: int, state: ModelState) -> None:
        """Entry ``number`` was applied and gave ``state``."""
        if state.version in self._last_uses:
            self._made[state.version] = state.parameters
        for version in [made for made in self._made if self._last_uses[made] <= number]:
            del self._made[version]


def replay(
    journal: History,
    state: ModelState,
    sequence: int,
    *,
    schema: Schema,
    bases: Bases,
    on_version: Callable[[ModelState], None] = lambda _state: None,
    on_entry: Callable[[int, ModelState], None] = lambda _number, _state: None,
    published: Mapping[ModelVersion, bytes] | None = None,
    through_resets: bool = True,
) -> tuple[int, ModelState]:
    """Apply every entry after record ``sequence`` and return how many there were and the state after them.

    Args:
        journal: whose entries.
        state: the state after record ``sequence``.
        sequence: where to begin; 0 for the whole journal.
        schema: of the model there; a reset brings its own.
        bases: for aggregators that need the base version's parameters; asked for versions before ``state``.
        on_version: told of each new version.
        on_entry: told of each entry's number, and of the state before it.
        published: fingerprints of the versions as aggregated; None: those that the journal still counts.
        through_resets: False leaves out what a later reset made of no account.

    Raises:
        ReplayMismatch: a version is not the one that was published.
        JournalDamaged: an entry cannot be applied.
        FileNotFoundError: a base from before ``state`` is not kept; an earlier state would give it.
    """
    if published is None:
        published = {row.version: row.exact or row.fingerprint for row in journal.published()}
    needed = state.rules.aggregator.needs_base
    made = _MadeBases(bases, journal.last_uses(sequence, needed=needed), published)
    made.note(sequence, state)
    begin = 0 if through_resets else journal.ledger.reset_sequence
    applied = 0
    for number, entry in journal.entries_after(sequence):
        before = state.version
        if number < begin:
            state = replace(state, rules=entry.rules) if isinstance(entry, RulesEntry) else state
            continue
        on_entry(number, state)
        try:
            state = apply_entry(state, entry, schema, made)
        except (WireError, ValueError, TypeError) as error:
            raise JournalDamaged(f"record {number} cannot be replayed: {error}") from error
        if isinstance(entry, ResetEntry):
            schema = entry.schema
        applied += 1
        made.note(number, state)
        if state.version != before:
            check_published(state, published)
            on_version(state)
    return applied, state


def apply_entry(state: ModelState, entry: Entry, schema: Schema, bases: Bases) -> ModelState:
    """The state after one entry.

    Raises:
        WireError, ValueError, TypeError: the entry does not fit.
    """
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
        case ResetEntry():
            parameters = from_bytes(entry.parameters)
            if parameters.size != entry.schema.size:
                raise ValueError(f"a reset to {parameters.size} parameters of a model of {entry.schema.size}")
            return reset_state(state, entry.version, parameters)


def check_published(state: ModelState, published: Mapping[ModelVersion, bytes]) -> None:
    """Compare a replayed version with what was aggregated under its number before devices were offered it.

    Raises:
        ReplayMismatch: they differ.
    """
    expected = published.get(state.version)
    if expected is not None and expected != fingerprint(state.parameters):
        raise ReplayMismatch(
            f"replay gives other parameters for version {state.version} than were published: "
            f"expected SHA-256 {expected.hex()}, got {fingerprint(state.parameters).hex()}"
        )
