"""Whether a run's folder keeps its promises: what `invariants` says of what lies there. Nothing is written into it.

    replay/ -> see `verify_replay`
    checkpoints/, weights/ (or weights.dir) -> each version against its manifest
    metrics.jsonl -> what was told of each step
    events.jsonl -> what the time of each process went into

The run may be at work: what its processes remove while it is read is nothing to tell of.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from treepo_async.cluster import invariants
from treepo_async.cluster.invariants import Delivery, Verdict
from treepo_async.cluster.time_booked import time_booked
from treepo_async.cluster.verify_replay import read_lines, verify_replay
from treepo_async.config.command_line import load
from treepo_async.config.wiring import CONFIG_FILE, publications_of
from treepo_async.errors import ConfigError, DataError, WeightsError
from treepo_async.weights.checkpoints import CheckpointStore
from treepo_async.weights.manifest import Manifest
from treepo_async.weights.manifest import verify as verify_publication
from treepo_async.weights.store import versions_in


def verify_run(run_dir: Path, *, acks: Collection[Delivery] = ()) -> list[Verdict]:
    """Check all of a run.

    Args:
        run_dir: of a run, at work or ended.
        acks: trees that actors know to be accepted, if that was written down.

    Raises:
        ConfigError: the folder is no run.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{run_dir} has no {CONFIG_FILE}, so it is no run; give the folder that a run names as run_dir"
        )
    config = load(run_dir / CONFIG_FILE)
    max_staleness = config.replay.max_staleness
    publications = publications_of(run_dir, config.weights.dir)
    records = [
        row
        for row in read_lines(run_dir / "metrics.jsonl")
        if row.get("learner/lineage") is not None
    ]
    return [
        *verify_replay(
            run_dir / "replay",
            max_staleness=max_staleness,
            bounds=_bounds_of(records),
            keeps_trees=config.replay.durability == "disk",
            acks=acks,
        ),
        invariants.fresh_told(records, max_staleness),
        invariants.steps_told(records),
        time_booked(_ledger_lines(run_dir / "events.jsonl")),
        _folders("checkpoints", run_dir / "checkpoints", _checkpoint_damage),
        _folders("publications", publications, _publication_damage),
    ]


def _bounds_of(records: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """The bound of each step of the learner that was told with one; a record is numbered by what the step made."""
    return {
        row["step"] - 1: row["staleness/bound"]
        for row in records
        if row.get("staleness/bound") is not None
    }


def _ledger_lines(file: Path) -> list[Mapping[str, Any]]:
    return [row for row in read_lines(file) if row.get("event") == "ledger"]


def _folders(name: str, folder: Path, damage_of: Callable[[Path], str]) -> Verdict:
    """The verdict on all versions in a folder."""
    found: dict[str, str] = {}
    for version in versions_in(folder) if folder.is_dir() else []:
        damage = damage_of(folder / str(version))
        # a run at work removes what is too old
        if not damage or (folder / str(version)).exists():
            found[str(version)] = damage
    return invariants.folders_whole(name, found)


def _checkpoint_damage(folder: Path) -> str:
    store = CheckpointStore(folder.parent, keep=1)
    try:
        store.at(next(v for v in store.versions() if str(v) == folder.name))
    except (WeightsError, StopIteration) as error:
        return str(error)
    return ""


def _publication_damage(folder: Path) -> str:
    try:
        verify_publication(folder, Manifest.read(folder).tensors)
    except WeightsError as error:
        return str(error)
    return ""


def deliveries_in(files: Iterable[Path]) -> list[Delivery]:
    """Accepted trees in files of JSON lines with `lease`, `attempt`, `digest` and `note`.

    Raises:
        DataError: a file cannot be read, or a line lacks one of them.
    """
    found = []
    for file in files:
        if not file.is_file():
            raise DataError(f"acks={file} is no file")
        found += [_delivery(file, row) for row in read_lines(file) if row.get("note") == "accepted"]
    return found


def _delivery(file: Path, row: Mapping[str, Any]) -> Delivery:
    try:
        return Delivery(int(row["lease"]), int(row["attempt"]), int(row["digest"]))
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file}: {row} is no acknowledged tree: {error!r}") from error
