"""The host's side of a broadcast, against the real desk; SGLang and the senders are stand-ins."""

import asyncio

import pytest

from tests.engine.broadcasts import house, parcel_of
from tests.fakes import BASE, events_in, until
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import TensorInfo

FIRST, SECOND, THIRD = (PolicyVersion(0, step) for step in (1, 2, 3))
DRAIN, RETRACT, IN_PLACE = UpdateMode


async def test_a_version_is_sent_behind_a_closed_gate_by_groups_that_are_joined_once(
    tmp_path, capsys
):
    async with house(tmp_path) as it:
        it.desk.offer(parcel_of(FIRST))
        await it.applied(FIRST)
        assert it.doings()[2:] == [
            "close",
            "drained",
            "/flush_cache",
            "join",
            "join",
            "begin",
            "bucket",
            "end",
            "/generate",
            "open",
        ]
        await until(lambda: [order.step for order in it.orders] == [1, 1])
        it.desk.offer(parcel_of(SECOND))
        await it.applied(SECOND)
        assert it.doings().count("join") == 2
        assert it.server.starts == [(it.host.base_dir, "0.0")]
    weights = events_in(capsys.readouterr().out, "weights")
    assert [event["version"] for event in weights] == ["0.1", "0.2"]
    assert all(event["pause_s"] >= 0 for event in weights)


@pytest.mark.parametrize(("mode", "flush"), [(RETRACT, True), (IN_PLACE, False)])
async def test_a_paused_server_goes_on_before_the_proof_and_keeps_its_cache_where_it_must(
    tmp_path, mode, flush
):
    async with house(tmp_path, update_mode=mode) as it:
        it.desk.offer(parcel_of(FIRST))
        await it.applied(FIRST)
        doings = it.doings()
        assert doings.index("end") < doings.index("/continue_generation") < doings.index("open", 3)
        ((_, names, dtypes, flushed),) = [b for path, b in it.sglang.calls if path == "bucket"]
        assert (names, dtypes, flushed) == (("model.weight",), ("float32",), flush)


@pytest.mark.parametrize("trouble", ["refused", "other"])
async def test_a_failed_update_is_undone_by_a_start_and_sent_again_before_anybody_is_let_in(
    tmp_path, capsys, trouble
):
    async with house(tmp_path) as it:
        it.desk.offer(parcel_of(FIRST))
        await it.applied(FIRST)
        it.server.troubles.append(trouble)
        it.desk.offer(parcel_of(SECOND))
        await it.applied(SECOND)
        calls = it.sglang.calls
        assert it.server.starts[1:] == [(it.host.base_dir, "0.0")]
        opened = [found for path, found in calls if path == "open"]
        assert opened == ["0.0", "0.1", "0.2"], "let in under the initial model"
        joined = [found for path, found in calls if path == "join"]
        assert len(set(joined)) == 4, "a group was used again after a failure"
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert alarm["detail"].startswith("applying 0.2 failed")


async def test_a_sender_that_does_not_come_is_given_up_at_the_deadline(tmp_path, capsys):
    async with house(tmp_path, timeout_s=0.5) as it:
        it.server.troubles.append("frozen")
        it.desk.offer(parcel_of(FIRST))
        await it.applied(FIRST)
        assert len(it.server.starts) == 2
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert "the broadcast of 0.1 was not over after 0.5 s (weights.timeout_s)" in alarm["detail"]


async def test_an_engine_that_dies_is_sent_the_newest_version_without_a_publication(tmp_path):
    async with house(tmp_path) as it:
        it.desk.offer(parcel_of(FIRST))
        await it.applied(FIRST)
        it.server.die()
        await until(lambda: len(it.server.starts) == 2)
        await it.applied(FIRST)
        assert [found for path, found in it.sglang.calls if path == "open"] == [
            "0.0",
            "0.1",
            "0.1",
        ]


async def test_an_engine_that_dies_without_a_learner_lets_nobody_in_until_there_is_one(tmp_path):
    async with house(tmp_path) as it:
        it.desk.offer(parcel_of(FIRST))
        await it.applied(FIRST)
        await it.close_desk()
        it.server.die()
        await until(lambda: len(it.server.starts) == 2)
        await asyncio.sleep(0.3)
        assert it.doings()[-1] != "open"
        it.open_desk("another")
        later = PolicyVersion(1, 1)
        it.desk.offer(parcel_of(later))
        await it.applied(later)


async def test_a_learner_that_is_gone_as_it_is_asked_to_send_costs_no_restart(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("treepo_async.engine.broadcast.ANSWER_S", 0.5)
    async with house(tmp_path) as it:
        async with it.gate.passage():
            it.desk.offer(parcel_of(FIRST))
            await until(lambda: "close" in it.doings())
            await it.close_desk()
        await until(lambda: it.doings().count("open") == 2)
        assert it.host.applied == BASE
        it.open_desk("another")
        it.desk.offer(parcel_of(SECOND))
        await it.applied(SECOND)
        assert len(it.server.starts) == 1
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert (alarm["alarm"], alarm["version"]) == ("an update was not begun", "0.1")


async def test_a_version_that_comes_while_requests_drain_takes_the_place_of_the_one_before(
    tmp_path,
):
    async with house(tmp_path) as it:
        async with it.gate.passage():
            it.desk.offer(parcel_of(FIRST))
            await until(lambda: "close" in it.doings())
            it.desk.offer(parcel_of(SECOND))
        await it.applied(SECOND)
        await until(lambda: [order.step for order in it.orders] == [2, 2])
        assert it.doings().count("close") == 1


async def test_an_offer_that_is_not_of_the_model_never_closes_the_gate(tmp_path, capsys):
    async with house(tmp_path) as it:
        it.desk.offer(parcel_of(FIRST, tensors={"model.weight": TensorInfo("F32", (3, 2))}))
        await until(lambda: FIRST in it.host.refused)
        it.desk.offer(parcel_of(SECOND))
        await it.applied(SECOND)
        assert it.doings().count("close") == 1
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert (alarm["alarm"], alarm["version"]) == ("publication refused", "0.1")


async def test_an_engine_that_evaluates_sees_every_marked_version(tmp_path):
    async with house(tmp_path, evaluates=True, eval_timeout_s=0.5) as it:
        for version in (FIRST, SECOND, THIRD):
            it.desk.offer(parcel_of(version, evaluate=version is SECOND))
        await until(lambda: it.host.applied == SECOND)
        assert await asyncio.wait_for(it.gate.to_evaluate.get(), 10) == SECOND
        await it.applied(THIRD)


async def test_peers_of_another_run_are_refused(tmp_path):
    async with house(tmp_path) as it:
        from treepo_async.errors import RefusedError
        from treepo_async.wire.messages import AskWeights, Hello
        from treepo_async.wire.sockets import Requester

        ask = AskWeights(engine="engine-0", lineage=0, step=0)
        async with Requester(
            it.endpoint, name="x", owner="desk", hello=Hello(name="x", run_id="other")
        ) as stranger:
            with pytest.raises(RefusedError, match="this is run run, not other"):
                await stranger.ask(ask, timeout_s=5, wait="nothing")
