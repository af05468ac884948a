"""What scripted processes told, as rows; made events, nothing runs."""

import json
from dataclasses import replace

import pytest

from treepo_async.bench.async_cells import parse
from treepo_async.bench.async_compare import plain_script
from treepo_async.bench.async_scripted import read_cell
from treepo_async.bench.async_summary import summarize


def tell(folder, role, *events):
    lines = (json.dumps(event) + "\n" for event in events)
    (folder / f"{role}.jsonl").write_text("".join(lines))


def step(number, at):
    seconds = {"wait_batch": 4.0, "train": 5.0, "publish": 0.5, "ack": 0.5}
    return {
        "event": "step",
        "step": number,
        "at": at,
        "unique_tokens": 50,
        "lags": {"0": 100},
        **seconds,
    }


def slots(at, *busy):
    return {"event": "slots", "at": at, "gate": 0.0, "lease": 0.0, "put": 0.0, "busy": busy}


def weights(engine, at):
    return {"event": "weights", "at": at, "engine": engine, "step": 1, "drain": 1.5, "load": 0.5}


@pytest.fixture
def cell(tmp_path):
    """Two engines from 10 to 20: the first decodes until its gate is drained, the second nothing from 14 on."""
    tell(tmp_path, "learner", step(1, 10.0), step(2, 20.0))
    tell(tmp_path, "replay", {"event": "tree", "outcome": "accepted", "decoded_tokens": 50})
    tell(tmp_path, "gates", weights(0, 17.0), weights(1, 11.0), weights(0, 5.0))
    tell(tmp_path, "actor-0", slots(12.0, (8, 12)), slots(21.0, (12, 16.5), (17, 18)))
    tell(tmp_path, "actor-1", slots(18.0, (12, 14)))
    script = replace(plain_script(parse(["actors=2"])), arm="sync", warm_up=1)
    return read_cell(script, tmp_path)


def test_an_engine_is_idle_while_its_gate_is_open_and_no_request_runs(cell):
    found = {row.account: row.seconds for row in cell.ledger if row.role == "engine"}
    # closed: 15 to 17 and 10 to 11; of what is decoded, 15 to 16.5 is behind a closed gate
    assert found == {"sync": 3.0, "compute": (5.0 + 1.0) + 2.0, "idle": 2.0 + 5.0}
    (summary,) = summarize([cell])
    assert summary.engine_idle == pytest.approx(7 / 18)
