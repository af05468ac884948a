import asyncio
import threading

import pytest

import treepo_async.metrics.tell
from tests.fakes import events_in, until
from tests.metrics.clock import FakeClock
from treepo_async.metrics.categories import ACTOR, LEARNER, REPLAY, Category
from treepo_async.metrics.ledger import Row, SlotLedger
from treepo_async.metrics.slots import Slot
from treepo_async.metrics.spans import MAX_LINE_BYTES, emit_rows, span
from treepo_async.metrics.tell import TELL_S, Teller, telling, telling_beside


def test_what_is_told_covers_the_time_since_the_last_telling(capsys):
    clock = FakeClock()
    slot = Slot(SlotLedger(LEARNER, clock=clock), "rank-0")
    clock.passes(5)
    teller = Teller(slot.ledger, "learner", rank=0)
    with slot("train", step=3):
        clock.passes(2)
    with slot("publish"):
        clock.passes(1)
        teller.tell()
        clock.passes(1)
    teller.tell()
    out = capsys.readouterr().out
    first, second = events_in(out, "ledger")
    assert (first["kind"], first["rank"]) == ("learner", 0)
    assert (first["begin"], first["end"]) == (105, 108)
    assert first["seconds"] == {"compute": 2, "sync": 1}
    assert (second["begin"], second["end"]) == (108, 109)
    assert second["seconds"] == {"sync": 1}
    rows = [row for event in events_in(out, "spans") for row in event["rows"]]
    assert rows == [
        ["rank-0", "train", "compute", 105, 2, {"step": 3}],
        ["rank-0", "publish", "sync", 107, 2, {}],
    ]


def test_a_loop_that_comes_by_often_tells_now_and_then(capsys):
    clock = FakeClock()
    teller = Teller(SlotLedger(REPLAY, clock=clock), "replay")
    for _ in range(100):
        clock.passes(TELL_S / 10)
        teller.tell_if_due()
    assert 8 <= len(events_in(capsys.readouterr().out, "ledger")) <= 10


def test_spans_that_were_not_kept_are_counted(capsys):
    ledger = SlotLedger(LEARNER)
    for _ in range(405):
        ledger.note(Row("t", "n", "sync", 0.0, 1.0, {}))
    Teller(ledger, "learner").tell()
    (dropped,) = events_in(capsys.readouterr().out, "spans_dropped")
    assert dropped["number"] == 5


def test_a_ledger_of_another_kind_of_process_is_refused():
    with pytest.raises(ValueError, match="actor"):
        Teller(SlotLedger(LEARNER), "actor")


async def test_a_role_that_ends_before_it_told_anything_tells_at_its_end(capsys):
    async with telling(Teller(SlotLedger(ACTOR), "actor")):
        pass
    with telling_beside(Teller(SlotLedger(LEARNER), "learner")):
        pass
    told = events_in(capsys.readouterr().out, "ledger")
    assert [event["kind"] for event in told] == ["actor", "learner"]


async def test_an_asyncio_role_tells_while_it_works_and_no_more_after_its_end(capsys, monkeypatch):
    monkeypatch.setattr(treepo_async.metrics.tell, "TELL_S", 0.01)
    told = []

    def has_told():
        told.extend(events_in(capsys.readouterr().out, "ledger"))
        return len(told) > 2

    async with telling(Teller(SlotLedger(ACTOR), "actor")):
        await until(has_told)
    told.extend(events_in(capsys.readouterr().out, "ledger"))
    ends = [event["end"] for event in told]
    assert [event["begin"] for event in told][1:] == ends[:-1]
    await asyncio.sleep(0.03)
    assert events_in(capsys.readouterr().out, "ledger") == []


def test_a_thread_tells_for_a_process_that_is_blocked(capsys, monkeypatch):
    monkeypatch.setattr(treepo_async.metrics.tell, "TELL_S", 0.01)
    slot = Slot(SlotLedger(LEARNER), "rank-0")
    with telling_beside(Teller(slot.ledger, "learner")), slot("train"):
        threading.Event().wait(0.1)
    told = events_in(capsys.readouterr().out, "ledger")
    assert len(told) > 2
    booked = sum(sum(event["seconds"].values()) for event in told)
    assert booked == pytest.approx(told[-1]["end"] - told[0]["begin"], rel=1e-3)
    assert "ledger" not in {thread.name for thread in threading.enumerate()}


def test_a_span_is_told_when_it_ends_also_by_a_failure(capsys):
    def load():
        with span("load", Category.SYNC, track="weights", version="0.3") as words:
            words["bytes"] = 7
            raise KeyError

    with pytest.raises(KeyError):
        load()
    (event,) = events_in(capsys.readouterr().out, "spans")
    ((track, name, category, _, seconds, args),) = event["rows"]
    assert (track, name, category) == ("weights", "load", "sync")
    assert seconds >= 0
    assert args == {"version": "0.3", "bytes": 7}


def test_lines_of_many_spans_stay_whole_in_a_pipe(capsys):
    rows = [Row("slot", "grow", "compute", 1.0, 1.0, {"lease": "a" * 200}) for _ in range(100)]
    emit_rows(rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < MAX_LINE_BYTES + 100 < 4096
    assert sum(len(event["rows"]) for event in events_in(out, "spans")) == 100
