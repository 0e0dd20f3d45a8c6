"""``fedtide journal``: verify, replay, repair and export what the coordinator has recorded."""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
import msgspec

from coordinator.audit import audit, numbered
from coordinator.entries import FlushEntry, ResetEntry, RulesEntry, UpdateEntry
from coordinator.journal import Damage, History, JournalDamaged
from coordinator.journal.check import Verification
from coordinator.journal.check import verify as verify_journal
from coordinator.lost_records import LostUpdate
from coordinator.model_store import ModelStore
from coordinator.repair import Repair
from coordinator.repair import repair as repair_journal
from fedtide.cli.fleet import DIRECTORY
from fedtide.fleet_directory import FleetDirectory
from fedtide.wire.disk import OS_DISK
from fedtide.wire.parameters import Schema

_QUIET_S: Final = 2.0  # what takes no longer needs no progress
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="For machines.")


@click.group()
def journal() -> None:
    """Verify, replay, repair and export what the coordinator has recorded."""


@journal.command()
@DIRECTORY
@_JSON
def verify(path: Path, *, as_json: bool) -> None:
    """Look at every byte of the journal and say where damage is. Changes nothing.

    Works beside a running coordinator.

    \b
    Exit codes: 0 everything is as it was written, 1 something is damaged.

    \b
    Examples:
      fedtide journal verify --dir pumps
      fedtide journal verify --dir pumps --json | jq .damages
    """
    found = verify_journal(_directory(path), progress=_progress("verified"))
    if as_json:
        click.echo(msgspec.json.encode(_verification(found)).decode())
    else:
        _show_verification(found)
    sys.exit(1 if found.damages else 0)


@journal.command()
@DIRECTORY
@_JSON
def replay(path: Path, *, as_json: bool) -> None:
    """Make every published version again from the journal and compare its SHA-256.

    Begins at the oldest snapshot that is kept, or at the first entry. Works beside a running coordinator.

    \b
    Exit codes: 0 every version came out again, 1 one did not, or the journal is damaged.

    \b
    Examples:
      fedtide journal replay --dir pumps
      fedtide journal replay --dir pumps --json
    """
    history = History(_directory(path))
    models = ModelStore(FleetDirectory(path).state / "models", history.ledger.schema or Schema(tensors=()), 1)
    done = audit(history, models.base, _progress("replayed"))
    rate = done.entries / done.seconds
    if as_json:
        click.echo(msgspec.json.encode({**msgspec.to_builtins(done), "entries_per_s": rate}).decode())
        return
    click.echo(
        f"Replayed {done.entries:,} entries after record {done.since} in {done.seconds:.1f} s "
        f"({rate:,.0f} a second).\n"
        f"{done.versions:,} published versions and {done.snapshots:,} snapshots came out the same to the "
        f"bit; the newest version is {done.version}."
    )


@journal.command()
@DIRECTORY
@_JSON
def repair(path: Path, *, as_json: bool) -> None:
    """Repair a damaged journal. Nothing is deleted: what is taken out goes to state/set-aside/.

    A single wrong bit is put right. Where a whole snapshot comes after the damage, only history is lost. Else
    the model goes on from before the damage, under a new and higher version, and the updates that count no
    more are listed.

    \b
    Stop the coordinator first.
    Exit codes: 0 the journal is whole now, 1 it could not be repaired or a coordinator is running.

    \b
    Examples:
      fedtide journal repair --dir pumps
      fedtide journal repair --dir pumps --json | jq .lost
    """
    _directory(path)
    done = repair_journal(FleetDirectory(path).state, say=lambda text: click.echo(text, err=True))
    left = verify_journal(_directory(path))
    if as_json:
        click.echo(msgspec.json.encode(_repair(done)).decode())
    else:
        _show_repair(done)
    if left.damages:
        raise JournalDamaged(left.damages[0])


@journal.command()
@DIRECTORY
@click.option(
    "--envelopes",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write each update's envelope, as it arrived, to a file in this directory.",
)
def export(path: Path, *, envelopes: Path | None) -> None:
    """Write every entry that is kept as a JSON line, oldest first. Works beside a running coordinator.

    \b
    Examples:
      fedtide journal export --dir pumps > pumps.jsonl
      fedtide journal export --dir pumps --envelopes updates/ | jq -r .device | sort | uniq -c
    """
    if envelopes is not None:
        envelopes.mkdir(parents=True, exist_ok=True)
    for found in numbered(History(_directory(path))):
        click.echo(msgspec.json.encode(_line(found.number, found.entry, found.version)).decode())
        if envelopes is not None and isinstance(found.entry, UpdateEntry):
            name = f"{found.number:012d}-{found.entry.device}-{found.entry.counter}.envelope"
            (envelopes / name).write_bytes(found.entry.envelope)


class _Line(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An entry as it is exported. ``version``: after it."""

    sequence: int
    kind: str
    version: int
    device: str | None = None
    counter: int | None = None
    base_version: int | None = None
    staleness: int | None = None
    staleness_weight: float | None = None
    importance: float | None = None
    bytes: int | None = None
    sha256: str | None = None
    plan: str | None = None
    why: str | None = None
    rules: msgspec.Raw | None = None


def _line(sequence: int, entry: UpdateEntry | FlushEntry | RulesEntry | ResetEntry, version: int) -> _Line:
    match entry:
        case UpdateEntry():
            return _Line(
                sequence=sequence,
                kind="update",
                version=version,
                device=entry.device,
                counter=entry.counter,
                base_version=entry.base_version,
                staleness=entry.staleness,
                staleness_weight=entry.staleness_weight,
                importance=entry.importance,
                bytes=len(entry.envelope),
                sha256=hashlib.sha256(entry.envelope).hexdigest(),
            )
        case FlushEntry():
            return _Line(sequence=sequence, kind="flush", version=version)
        case RulesEntry():
            rules = msgspec.Raw(entry.rules.to_bytes())
            return _Line(sequence=sequence, kind="rules", version=version, rules=rules)
        case ResetEntry():
            return _Line(
                sequence=sequence,
                kind="reset",
                version=version,
                plan=entry.plan,
                why=entry.why,
                bytes=len(entry.parameters),
                sha256=hashlib.sha256(entry.parameters).hexdigest(),
            )


class _Place(msgspec.Struct, frozen=True):
    """A damaged place."""

    file: str
    offset: int
    sequence: int | None
    what: str


def _places(damages: list[Damage]) -> list[_Place]:
    return [_Place(str(each.file), each.offset, each.sequence, each.what) for each in damages]


class _Segment(msgspec.Struct, frozen=True):
    """A segment that was verified."""

    first: int
    last: int
    bytes: int
    snapshot_bytes: int | None


class _Verified(msgspec.Struct, frozen=True):
    """What verifying found."""

    whole: bool
    segments: list[_Segment]
    entries: int
    torn_bytes: int
    totals: dict[str, int]
    damages: list[_Place]


def _verification(found: Verification) -> _Verified:
    return _Verified(
        whole=not found.damages,
        segments=[_Segment(each.first, each.last, each.size, each.snapshot_bytes) for each in found.segments],
        entries=found.entries,
        torn_bytes=found.torn_bytes,
        totals=found.ledger.totals if found.ledger else {},
        damages=_places(found.damages),
    )


def _show_verification(found: Verification) -> None:
    for segment in found.segments:
        snapshot = "" if segment.snapshot_bytes is None else f", snapshot of {segment.snapshot_bytes:,} bytes"
        state = "damaged" if segment.damages else "whole"
        click.echo(
            f"records {segment.first:>9,} to {segment.last:>9,}  {segment.size:>13,} bytes{snapshot}  {state}"
        )
    for damage in found.damages:
        click.secho(f"Damage: {damage}", fg="red")
    if found.torn_bytes:
        click.echo(f"{found.torn_bytes:,} bytes at the end are unfinished; the next start cuts them off.")
    if found.damages:
        click.echo("Stop the coordinator and run: fedtide journal repair")
    elif found.ledger is not None:
        fates = ", ".join(f"{number:,} {fate}" for fate, number in sorted(found.ledger.totals.items()))
        click.echo(f"Whole: {found.entries:,} entries; updates: {fates or 'none'}.")


class _Repaired(msgspec.Struct, frozen=True):
    """What a repair did."""

    damages: list[_Place]
    corrected: list[_Place]
    set_aside: list[str]
    history_from: int
    lost: list[LostUpdate]
    unreadable: int
    version: int | None


def _repair(done: Repair) -> _Repaired:
    return _Repaired(
        damages=_places(done.damages),
        corrected=_places(done.corrected),
        set_aside=[str(file) for file in done.set_aside],
        history_from=done.history_from,
        lost=done.lost,
        unreadable=done.unreadable,
        version=done.version,
    )


def _show_repair(done: Repair) -> None:
    if not done.damages:
        click.echo("Nothing is damaged.")
        return
    click.echo(f"Damaged places: {len(done.damages)}; single bits put right: {len(done.corrected)}.")
    if done.history_from > 1:
        click.echo(f"The history begins with record {done.history_from:,}.")
    if done.version is None:
        click.echo("No update was lost and the model is as it was.")
    else:
        click.echo(
            f"The model goes on as version {done.version}. {len(done.lost):,} updates that had a receipt "
            f"count no more, and {done.unreadable:,} records could not be read."
        )
    if done.directory is not None:
        click.echo(f"What was taken out is in {done.directory}.")


def _directory(path: Path) -> Path:
    directory = FleetDirectory(path).state / "journal"
    if not OS_DISK.names(directory):
        raise click.ClickException(
            f"there is no journal in {path}; a coordinator makes one: fedtide coordinator run --dir {path}"
        )
    return directory


def _progress(verb: str) -> Callable[[int, int], None]:
    """Says how far it is, once a second and not before two have passed."""
    begun = said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - begun > _QUIET_S and now - said > 1.0 and total:
            said = now
            click.echo(f"{verb} {done / total:.0%} …", err=True)

    return say
