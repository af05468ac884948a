import asyncio
import contextlib
import time
from collections import deque
from dataclasses import replace

import aiohttp
import numpy as np
import pytest

import treepo_async.engine.client
from tests.fakes import VOCAB_SIZE, FakeSGLang, fake_logprob, open_gate, until
from treepo_async.engine.answer import NotFiniteError, Watch, entropy_of
from treepo_async.engine.client import (
    MAX_ATTEMPTS,
    WARM_TOKENS,
    Ask,
    EngineClient,
    SamplingSettings,
    all_of,
)
from treepo_async.engine.routing import Place
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.types import PolicyVersion

VERSION = PolicyVersion(0, 3)
SAMPLING = SamplingSettings(0.7, (1, 5))
PREFIX = [4, 8, 15]


@pytest.fixture(autouse=True)
def _no_pause_between_attempts(monkeypatch):
    monkeypatch.setattr(treepo_async.engine.client, "RETRY_S", 0.01)


@contextlib.asynccontextmanager
async def connected(
    *, request_timeout_s=5.0, gate_timeout_s=5.0, update_mode=UpdateMode.DRAIN, **fake
):
    async with (
        FakeSGLang(version=str(VERSION), **fake) as sglang,
        open_gate(VERSION, timeout_s=gate_timeout_s) as (keeper, gate),
        aiohttp.ClientSession() as session,
        asyncio.timeout(30),
    ):
        client = EngineClient(
            sglang.url,
            gate,
            session,
            namespace="run7",
            vocab_size=VOCAB_SIZE,
            request_timeout_s=request_timeout_s,
            update_mode=update_mode,
        )
        yield sglang, keeper, client


async def extend(client, prefix=PREFIX, *, num_runs=1, max_new_tokens=4, **options):
    return await client.extend(
        prefix, num_runs=num_runs, max_new_tokens=max_new_tokens, sampling=SAMPLING, **options
    )


async def test_completions_carry_tokens_log_probs_versions_and_cache_counts():
    async with connected(level=2.0) as (_, _, client):
        completions = await extend(client, num_runs=3)
    assert len(completions) == 3
    for completion in completions:
        tokens = completion.run.token_ids.tolist()
        assert tokens == [2, 3, 4, 5]
        expected = np.array([fake_logprob(t, 2.0) for t in tokens], np.float32)
        np.testing.assert_array_equal(completion.run.behavior_logprobs, expected)
        assert [(s.policy_version, s.num_tokens) for s in completion.run.spans] == [(VERSION, 4)]
        assert (completion.prefix_tokens, completion.cached_tokens) == (3, 2)
        assert 0 <= completion.overhead_s < 1


async def test_a_request_is_spelled_as_sglang_wants_it():
    async with connected() as (sglang, _, client):
        await extend(client, num_runs=3)
        bodies = sglang.bodies("/generate")
    ids = [body.pop("rid") for body in bodies]
    assert len(set(ids)) == 3
    assert {len(i) for i in ids} == {32}, "an id that begins another one would be aborted with it"
    assert (
        bodies
        == [
            {
                "input_ids": PREFIX,
                "extra_key": "run7.0.3",
                "return_logprob": True,
                "logprob_start_len": -1,
                "sampling_params": {
                    "max_new_tokens": 4,
                    "temperature": 0.7,
                    "stop_token_ids": [1, 5],
                },
            }
        ]
        * 3
    )


async def test_a_long_new_prefix_is_prefilled_once_before_it_is_forked():
    prefix = [3] * WARM_TOKENS
    async with connected() as (sglang, _, client):
        await extend(client, prefix, num_runs=2, is_cached=False)
        await extend(client, prefix, num_runs=2, is_cached=True)
        await extend(client, prefix, num_runs=1, is_cached=False)
        await extend(client, prefix[1:], num_runs=2, is_cached=False)
        asked = [b["sampling_params"]["max_new_tokens"] for b in sglang.bodies("/generate")]
    assert asked == [0, 4, 4, 4, 4, 4, 4, 4]


FAULTS = ["drop", "500", "abort", "garbage", "not_understood", "other_version"]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_bad_answer_is_asked_for_again(fault):
    async with connected() as (sglang, _, client):
        sglang.generate_faults.extend([fault] * (MAX_ATTEMPTS - 1))
        (completion,) = await extend(client)
        assert len(completion.run) == 4
        ids = [body["rid"] for body in sglang.bodies("/generate")]
        assert len(ids) == len(set(ids)) == MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("drop", "ServerDisconnected|ClientOSError|reset by peer"),
        ("500", "SGLang answered 500: .*scheduler trouble"),
        ("abort", "SGLang aborted the request: Aborted"),
        ("garbage", "answer cannot be used: UnicodeDecodeError"),
        ("not_understood", "answer cannot be used: KeyError.*meta_info"),
        ("other_version", r"sampled under 0\.999, but submitted under 0\.3"),
    ],
)
async def test_an_engine_that_stays_bad_is_given_up_with_its_last_words(fault, said):
    async with connected() as (sglang, _, client):
        sglang.generate_faults.extend([fault] * 20)
        with pytest.raises(EngineError, match=f"no completion after 3 attempts: .*({said})"):
            await extend(client)
        assert len(sglang.bodies("/generate")) == MAX_ATTEMPTS


async def test_log_probs_that_are_not_finite_are_an_error_at_once():
    async with connected() as (sglang, _, client):
        sglang.generate_faults.append("nan")
        with pytest.raises(NotFiniteError, match="log-probs that are not finite"):
            await extend(client)
        assert len(sglang.bodies("/generate")) == 1


async def test_a_request_that_was_lost_twice_is_tried_while_no_other_one_runs():
    async with connected() as (sglang, _, client):
        sglang.latency_s = 0.05
        beside = []

        async def poison():
            with pytest.raises(EngineError, match="no completion after 3 attempts"):
                await extend(client, [66, 7])

        async def innocent(token):
            (completion,) = await extend(client, [token, 7])
            assert len(completion.run) == 4

        # a server that loses what runs in it, and is there again at once
        sglang.dies_of = 66
        sglang.on_death = lambda: beside.append(len(sglang.running))
        innocents = [asyncio.create_task(innocent(token)) for token in range(10, 16)]
        await until(lambda: len(sglang.running) == 6)
        await asyncio.gather(poison(), *innocents)
    assert (len(beside), beside[0], beside[-1]) == (3, 6, 0)


async def test_a_retry_is_made_under_the_version_of_its_time():
    async with connected() as (sglang, keeper, client):
        sglang.generate_faults.append("hang")
        work = asyncio.create_task(extend(client))
        await until(lambda: sglang.running)
        newer = PolicyVersion(0, 4)
        await keeper.open(newer, evaluate=False, hold_s=0)
        sglang.version = str(newer)
        next(iter(sglang.running.values())).set()
        (completion,) = await work
        assert completion.run.spans[0].policy_version == newer
        keys = [body["extra_key"] for body in sglang.bodies("/generate")]
    assert keys == ["run7.0.3", "run7.0.4"]


@pytest.mark.parametrize("outside", [-1, VOCAB_SIZE, 99_999])
async def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_sent(outside):
    async with connected() as (sglang, _, client):
        with pytest.raises(
            EngineError, match=f"token id {outside} is outside the vocabulary of 128"
        ):
            await extend(client, [3, outside, 4])
        assert sglang.calls == []


async def test_a_cancelled_extension_aborts_each_of_its_requests():
    async with connected() as (sglang, _, client):
        sglang.generate_faults.extend(["hang"] * 3)
        work = asyncio.create_task(extend(client, num_runs=3))
        await until(lambda: len(sglang.running) == 3)
        ids = set(sglang.running)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert {body["rid"] for body in sglang.bodies("/abort_request")} == ids
        await until(lambda: not sglang.running)


async def test_a_cancelled_extension_ends_also_when_the_server_is_gone():
    async with connected() as (sglang, _, client):
        sglang.generate_faults.append("hang")
        work = asyncio.create_task(extend(client))
        await until(lambda: sglang.running)
        client._url = "http://127.0.0.1:9"  # where nobody takes the abort
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert len(sglang.bodies("/generate")) == 1


async def test_one_failure_cancels_and_aborts_its_siblings():
    async with connected() as (sglang, _, client):
        sglang.generate_faults.extend(["hang", *["500"] * MAX_ATTEMPTS])
        begin = time.monotonic()
        with pytest.raises(EngineError, match="scheduler trouble"):
            await extend(client, num_runs=2)
        assert time.monotonic() - begin < 5
        assert len(sglang.bodies("/abort_request")) == 1


async def test_a_request_beyond_its_deadline_is_aborted_and_tried_again():
    async with connected(request_timeout_s=0.3) as (sglang, _, client):
        sglang.generate_faults.append("hang")
        (completion,) = await extend(client)
        assert len(completion.run) == 4
        first, _ = sglang.bodies("/generate")
        assert sglang.bodies("/abort_request") == [{"rid": first["rid"]}]


async def test_a_closed_gate_is_a_deadline_and_not_an_engine_error():
    async with connected(gate_timeout_s=0.3) as (sglang, _, client):
        begin = time.monotonic()
        with pytest.raises(DeadlineError, match="gate to open at policy step 9"):
            await extend(client, least_step=9)
        assert time.monotonic() - begin < 0.3 * MAX_ATTEMPTS
        assert sglang.calls == []


async def test_nothing_is_sent_while_the_gate_is_closed():
    async with connected() as (sglang, keeper, client):
        await keeper.close()
        assert await keeper.drained(timeout_s=5)
        work = asyncio.create_task(extend(client))
        await asyncio.sleep(0.2)
        assert sglang.calls == []
        await keeper.open(VERSION, evaluate=False, hold_s=0)
        assert len(await work) == 1


LIVED_THROUGH = [
    {"version": "0.3", "start": 0, "end": 1},
    {"version": "0.4", "start": 1, "end": 4},
]
NEWER = PolicyVersion(0, 4)


@pytest.mark.parametrize("mode", [UpdateMode.RETRACT, UpdateMode.IN_PLACE])
async def test_an_answer_of_newer_weights_waits_until_the_host_has_proven_them(mode):
    async with connected(update_mode=mode, weight_versions=LIVED_THROUGH) as (
        sglang,
        keeper,
        client,
    ):
        sglang.latency_s = 0.2
        work = asyncio.create_task(extend(client))
        await until(lambda: sglang.running)
        await keeper.close()
        await asyncio.sleep(0.5)
        assert not sglang.running
        assert not work.done()
        await keeper.open(NEWER, evaluate=False, hold_s=0)
        (completion,) = await work
    assert [span.policy_version for span in completion.run.spans] == [VERSION, NEWER]
    assert [span.mixed_context for span in completion.run.spans] == [
        False,
        mode is UpdateMode.IN_PLACE,
    ]


async def test_an_answer_of_newer_weights_is_given_up_when_the_host_goes_back_to_the_old_ones():
    async with connected(update_mode=UpdateMode.RETRACT, weight_versions=LIVED_THROUGH) as (
        sglang,
        keeper,
        client,
    ):
        sglang.latency_s = 0.2
        work = asyncio.create_task(extend(client))
        await until(lambda: sglang.running)
        await keeper.close()
        await until(lambda: not sglang.running)
        sglang.weight_versions = None
        await keeper.open(VERSION, evaluate=False, hold_s=0)
        (completion,) = await work
        assert [span.policy_version for span in completion.run.spans] == [VERSION]
        assert len(sglang.bodies("/generate")) == 2


async def test_an_answer_of_newer_weights_that_are_never_proven_is_a_deadline():
    async with connected(
        gate_timeout_s=0.5, update_mode=UpdateMode.RETRACT, weight_versions=LIVED_THROUGH
    ) as (sglang, keeper, client):
        sglang.latency_s = 0.2
        work = asyncio.create_task(extend(client))
        await until(lambda: sglang.running)
        await keeper.close()
        with pytest.raises(DeadlineError, match="the gate to open"):
            await work


@pytest.mark.parametrize(("is_down", "patience_s"), [(True, 60.0), (False, 0.2)])
async def test_an_answer_that_another_engine_can_give_waits_for_no_server_that_is_down_and_not_long(
    is_down, patience_s
):
    ask = Ask(PREFIX, 4, SAMPLING)
    async with connected(
        gate_timeout_s=60.0, update_mode=UpdateMode.RETRACT, weight_versions=LIVED_THROUGH
    ) as (sglang, keeper, client):
        sglang.latency_s = 0.2
        work = asyncio.create_task(client.attempt(ask, alone=False, patience_s=patience_s))
        await until(lambda: sglang.running)
        await keeper.close(is_down=is_down)
        with pytest.raises(EngineError, match=r"sampled under 0\.4, which its host did not prove"):
            await work


async def test_the_time_without_a_server_costs_one_attempt_however_long_it_is():
    async with connected(generate_faults=deque(["drop"])) as (sglang, keeper, client):
        answer, restarted = keeper._router.send, asyncio.Event()

        async def silent(*arguments):
            await restarted.wait()
            return await answer(*arguments)

        keeper._router.send = silent
        task = asyncio.create_task(extend(client))
        await until(lambda: sglang.bodies("/generate"))
        await asyncio.sleep(10 * MAX_ATTEMPTS * treepo_async.engine.client.RETRY_S)
        assert len(sglang.bodies("/generate")) == 1, (
            "nobody has said that the server is there again"
        )
        restarted.set()
        assert len(await task) == 1
        assert len(sglang.bodies("/generate")) == 2


def watch(is_over, every_tokens=4):
    return Watch(every_tokens, lambda: is_over)


async def test_a_watched_request_that_is_not_over_returns_what_any_other_returns():
    async with connected() as (sglang, _, client):
        (plain,) = await extend(client, max_new_tokens=10)
        (watched,) = await extend(client, max_new_tokens=10, watch=watch(lambda _: False))
        first, second = sglang.bodies("/generate")
    assert watched.run.token_ids.tolist() == plain.run.token_ids.tolist()
    assert watched.run.spans == plain.run.spans
    assert "stream" not in first
    assert second["stream"] is True
    assert second["sampling_params"]["stream_interval"] == 4
    assert sglang.bodies("/abort_request") == []


async def test_a_watch_sees_the_tokens_grow_and_ends_the_request():
    seen = []

    def is_over(token_ids):
        seen.append(len(token_ids))
        return len(token_ids) >= 8

    async with connected(latency_s=0.05) as (sglang, _, client):
        (completion,) = await extend(client, max_new_tokens=40, watch=watch(is_over))
        (body,) = sglang.bodies("/generate")
        assert sglang.bodies("/abort_request") == [{"rid": body["rid"]}]
    assert seen == [1, 5, 9]
    # the engine decodes on until the abort reaches it; those tokens are told, too
    assert len(completion.run) == 11


async def test_a_watch_sees_the_versions_of_the_tokens_and_ends_what_is_outdated():
    seen = []

    def is_outdated(spans):
        seen.append([(span.policy_version, span.num_tokens) for span in spans])
        return len(seen) == 3

    wanted = watch(lambda _: False)._replace(is_outdated=is_outdated)
    async with connected(latency_s=0.05) as (sglang, _, client):
        (completion,) = await extend(client, max_new_tokens=40, watch=wanted)
        assert len(sglang.bodies("/abort_request")) == 1
    assert seen == [[(VERSION, number)] for number in (1, 5, 9)]
    assert len(completion.run) == 11


async def test_each_request_is_watched_by_itself():
    begun = []

    def begin():
        begun.append([])
        return lambda token_ids: begun[len(begun) - 1].append(len(token_ids))

    async with connected() as (_, _, client):
        await extend(client, num_runs=3, max_new_tokens=6, watch=Watch(4, begin))
    assert len(begun) == 3


async def test_a_request_that_was_aborted_while_it_waited_keeps_its_tokens():
    faults = deque(["waits"])
    async with connected(latency_s=0.05, generate_faults=faults) as (sglang, _, client):
        (completion,) = await extend(
            client, max_new_tokens=40, watch=watch(lambda tokens: len(tokens) > 4)
        )
        assert len(sglang.bodies("/generate")) == 1
    assert (completion.prefix_tokens, completion.cached_tokens) == (3, 0)
    assert len(completion.run) == 7


async def test_an_abort_by_somebody_else_is_tried_again():
    async with connected(generate_faults=deque(["abort"])) as (sglang, _, client):
        (completion,) = await extend(client, max_new_tokens=6, watch=watch(lambda _: False))
        assert len(sglang.bodies("/generate")) == 2
    assert len(completion.run) == 6


async def test_a_stream_that_breaks_off_is_tried_again():
    async with connected(generate_faults=deque(["drop"])) as (sglang, _, client):
        (completion,) = await extend(client, max_new_tokens=6, watch=watch(lambda _: False))
        assert len(sglang.bodies("/generate")) == 2
    assert len(completion.run) == 6


async def test_the_entropy_of_the_last_token_is_given_where_it_is_asked_for():
    async with connected() as (sglang, _, client):
        (without,) = await extend(client)
        (completion,) = await client.extend(
            PREFIX, num_runs=1, max_new_tokens=4, sampling=replace(SAMPLING, num_top_logprobs=2)
        )
        assert sglang.bodies("/generate")[1]["top_logprobs_num"] == 2
    assert without.entropy is None
    # 1/2, 1/4, and all others as one of 1/4
    assert completion.entropy == pytest.approx(1.5 * np.log(2))


@pytest.mark.parametrize("probabilities", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.25] * 4])
def test_entropy_of_all_tokens_is_that_of_the_distribution(probabilities):
    expected = -sum(p * np.log(p) for p in probabilities)
    assert entropy_of(np.log(probabilities).tolist()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ending", ["cancelled", "failed"])
async def test_work_that_is_cancelled_together_ends_what_it_does_on_its_way_out(ending):
    done = []

    async def quick():
        await asyncio.sleep(0.01 if ending == "failed" else 60)
        raise EngineError("the first")

    async def careful():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            done.append("said goodbye")

    work = asyncio.create_task(all_of([quick(), careful()]))
    await asyncio.sleep(0.05 if ending == "cancelled" else 0)
    if ending == "cancelled":
        work.cancel()
    (outcome,) = await asyncio.gather(work, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError if ending == "cancelled" else EngineError)
    assert done == ["said goodbye"]


@pytest.mark.parametrize(
    ("version", "num_warm"), [(VERSION, 0), (PolicyVersion(0, 2), 1), (None, 0)]
)
async def test_a_prefix_of_other_weights_is_computed_once_before_several_runs_go_on_from_it(
    version, num_warm
):
    async with connected() as (sglang, _, client):
        completions = await extend(client, [5] * WARM_TOKENS, num_runs=3, home=Place("", version))
        lengths = [b["sampling_params"]["max_new_tokens"] for b in sglang.bodies("/generate")]
    assert lengths == [0] * num_warm + [4] * 3
    assert [c.warmed_tokens for c in completions] == [num_warm, 0, 0]


async def test_behind_a_closed_gate_a_prefix_is_taken_for_lost():
    async with connected() as (sglang, keeper, client):
        await keeper.close()
        await until(lambda: client.has_lost(Place("", VERSION)))
        asked = asyncio.ensure_future(
            extend(client, [5] * WARM_TOKENS, num_runs=2, home=Place("", VERSION))
        )
        await asyncio.sleep(0.1)
        newer = PolicyVersion(0, 4)
        await keeper.open(newer, evaluate=False, hold_s=0)
        sglang.version = str(newer)
        await asked
        first, *_ = sglang.bodies("/generate")
    assert first["sampling_params"]["max_new_tokens"] == 0
