"""The real SGLang server, judged by Hugging Face transformers: tokens, log-probs, cache, weights."""

import asyncio
import random
import time
from copy import copy
from dataclasses import dataclass, field, replace

import aiohttp
import numpy as np
import psutil
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from tests.fakes import open_gate
from tests.oracle import sequence_logprobs, tiny_qwen2
from treepo_async.actor.expand import ExpandSettings, expand
from treepo_async.engine.answer import Watch
from treepo_async.engine.api_key import bearer, ensure_key, read_key
from treepo_async.engine.client import EngineClient, SamplingSettings
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.errors import EngineError, WeightsError
from treepo_async.process import free_ports
from treepo_async.tree.rules import GrowthRules
from treepo_async.tree.stopping import StopRules
from treepo_async.types import PolicyVersion, Prompt, leaves_of, path_of
from treepo_async.weights.manifest import Probe, TensorInfo, model_tensors, verify
from treepo_async.weights.store import NamedTensor, WeightStore

BASE, FIRST, SECOND = (PolicyVersion(0, step) for step in range(3))
VOCAB_SIZE, CONTEXT, EOS = 128, 512, 1
START_S, CALL_S = 150.0, 30.0
CLOSE = 1e-5
"""Nats; two float32 implementations of one forward pass."""
PROBE = [[7, 3, 99, 12, 4], [64, 2, 2, 31, 8, 8, 100, 5, 27, 33]]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(START_S + 60),
    pytest.mark.asyncio(loop_scope="module"),
]


@dataclass
class House:
    """A server with the weights of `loaded`, its gate, and publications of three sets of weights."""

    server: Server
    keeper: GateKeeper
    client: EngineClient
    store: WeightStore
    loaded: PolicyVersion = BASE

    async def use(self, version):
        """Have these weights loaded as a host does."""
        if version != self.loaded:
            await self.keeper.close()
            assert await self.keeper.drained(timeout_s=CALL_S)
            await self.server.flush_cache(timeout_s=CALL_S)
            await self.load(version, as_version=version)
            await self.keeper.open(version, evaluate=False, hold_s=0)

    async def load(self, version, *, as_version):
        path = self.store.path(version)
        await self.server.load_weights(path, str(as_version), timeout_s=CALL_S)
        self.loaded = version

    async def sample(self, prefix, *, temperature=1.0, num_tokens=24, stop_token_ids=(EOS,)):
        sampling = SamplingSettings(temperature, stop_token_ids)
        (completion,) = await self.client.extend(
            prefix, num_runs=1, max_new_tokens=num_tokens, sampling=sampling
        )
        return completion

    async def gap(self, version):
        """Largest difference of the engine to the probe of a version, in nats."""
        probe = verify(self.store.path(version), model_tensors(self.store.path(BASE))).probe
        found = await self.server.score(probe.token_ids, timeout_s=CALL_S)
        return max(
            np.abs(np.array(a) - b).max() for a, b in zip(found, probe.logprobs, strict=True)
        )


@pytest.fixture(scope="module")
def models():
    """Three random models that share nothing but their shape, in float32."""
    versions = (BASE, FIRST, SECOND)
    models = {version: tiny_qwen2(tied=False, seed=version.step).eval() for version in versions}
    for model in models.values():
        # SGLang would end any request there; what a test wants ended names its stop tokens
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    return models


@pytest.fixture(scope="module")
def store(models, tmp_path_factory):
    store = WeightStore(tmp_path_factory.mktemp("weights"), keep=3)
    config_dir = tmp_path_factory.mktemp("config")
    models[BASE].save_pretrained(config_dir)
    for version, model in models.items():
        store.publish(
            version,
            [
                NamedTensor(name, TensorInfo("F32", tuple(t.shape)), t.numpy().tobytes())
                for name, t in model.state_dict().items()
            ],
            config_file=config_dir / "config.json",
            probe=Probe(PROBE, [judge(model, ids).tolist() for ids in PROBE]),
            evaluate=False,
        )
    return store


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(store, tmp_path_factory):
    options = ServerOptions(
        port=free_ports(1)[0],
        dtype="float32",
        context_length=CONTEXT,
        max_total_tokens=8192,
        max_running_requests=16,
        prefill_chunk_tokens=512,
        log_file=tmp_path_factory.mktemp("log") / "sglang.log",
        key_file=tmp_path_factory.mktemp("key") / "key.yaml",
    )
    async with (
        aiohttp.ClientSession(headers=bearer(ensure_key(options.key_file))) as session,
        open_gate(BASE, timeout_s=CALL_S) as (keeper, gate),
    ):
        server = Server(options, session)
        try:
            await server.start(store.path(BASE), str(BASE), timeout_s=START_S)
            client = EngineClient(
                server.url,
                gate,
                session,
                namespace="run",
                vocab_size=VOCAB_SIZE,
                request_timeout_s=CALL_S,
            )
            yield House(server, keeper, client, store)
        finally:
            await server.stop()


def judge(model, token_ids, temperature=1.0):
    """Hugging Face's log-probs of all tokens but the first, [T - 1]."""
    return sequence_logprobs(model, token_ids, temperature).detach().numpy()


def gap_to(model, prefix, run, temperature=1.0):
    """Largest difference between the engine's log-probs of a run and the judge's."""
    expected = judge(model, [*prefix, *run.token_ids.tolist()], temperature)[-len(run) :]
    return np.abs(run.behavior_logprobs - expected).max()


def prompt_tokens(seed, num_tokens):
    """Random tokens, so that no two tests share a prefix in the cache."""
    return [random.Random(seed).randrange(2, VOCAB_SIZE) for _ in range(num_tokens)]


async def test_greedy_tokens_are_those_of_the_judge(house, models):
    await house.use(BASE)
    for seed, length in [(1, 1), (2, 17), (3, 60)]:
        prefix = prompt_tokens(seed, length)
        tokens = (await house.sample(prefix, temperature=0.0)).run.token_ids.tolist()
        for i, token in enumerate(tokens):
            logits = models[BASE](_row([*prefix, *tokens[:i]])).logits[0, -1]
            assert token == int(logits.argmax())


def _row(token_ids):
    import torch

    return torch.tensor([token_ids])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_log_probs_are_those_of_the_judge_at_the_sampling_temperature(
    house, models, temperature
):
    await house.use(BASE)
    for seed in range(4):
        prefix = prompt_tokens(10 + seed, 20)
        run = (await house.sample(prefix, temperature=temperature)).run
        assert gap_to(models[BASE], prefix, run, temperature) < CLOSE
        assert gap_to(models[BASE], prefix, run, temperature + 0.3) > 0.01


@dataclass
class RecordingEngine:
    """Passes on, and keeps every completion beside what was asked."""

    client: EngineClient
    answers: list = field(default_factory=list)

    async def warm(self, prefix, **options):
        await self.client.warm(prefix, **options)

    async def extend(self, prefix, **options):
        completions = await self.client.extend(prefix, **options)
        self.answers.append((options["is_cached"], completions))
        return completions


SETTINGS = ExpandSettings(
    growth=GrowthRules(
        segment_tokens=8,
        max_depth=4,
        width=8,
        branching_factor=2,
        first_fork_min=2,
        first_fork_max=2,
        fallback="random",
    ),
    stops=StopRules(eos_token_ids=frozenset({EOS}), decode=str),
    sampling=SamplingSettings(0.8, (EOS,)),
)


async def test_every_segment_of_a_tree_has_the_log_probs_of_its_whole_path(house, models):
    await house.use(BASE)
    engine = RecordingEngine(house.client)
    prompt = Prompt("p", np.array(prompt_tokens(20, 64), np.int32), "", "")
    segments, provenance = await expand(
        prompt, engine, SETTINGS, random.Random(0), lease_id="l", actor="a", least_step=0
    )
    assert len(segments) > 8
    controls = []
    for i, segment in enumerate(segments):
        before, parent = [], segment.parent
        while parent != -1:
            before = [*segments[parent].token_ids.tolist(), *before]
            parent = segments[parent].parent
        whole = [*prompt.token_ids.tolist(), *before, *segment.token_ids.tolist()]
        expected = judge(models[BASE], whole, 0.8)[-len(segment) :]
        assert np.abs(segment.behavior_logprobs - expected).max() < CLOSE, f"segment {i}"
        other = judge(models[FIRST], whole, 0.8)[-len(segment) :]
        controls.append(np.abs(segment.behavior_logprobs - other).max())
        assert segment.policy_version == BASE
    assert min(controls) > 0.1
    cached = [c for is_cached, found in engine.answers if is_cached for c in found]
    assert cached
    assert all(c.cached_tokens >= 0.95 * c.prefix_tokens for c in cached)
    assert provenance.decoded_tokens == sum(
        len(c.run) for _, found in engine.answers for c in found
    )


@pytest.mark.parametrize("growth", ["eager", "independent"])
async def test_other_kinds_of_growth_find_their_prefixes_in_the_cache_too(house, models, growth):
    await house.use(BASE)
    engine = RecordingEngine(house.client)
    seed = 70 + (growth == "eager")
    prompt = Prompt("p", np.array(prompt_tokens(seed, 200), np.int32), "", "")
    settings = replace(SETTINGS, growth=replace(SETTINGS.growth, growth=growth))
    segments, _ = await expand(
        prompt, engine, settings, random.Random(0), lease_id="l", actor="a", least_step=0
    )
    assert len(leaves_of(segments)) == 8
    completions = [c for _, found in engine.answers for c in found]
    assert all(c.cached_tokens >= 0.95 * c.prefix_tokens for c in completions)
    for leaf in leaves_of(segments):
        path = [segments[i] for i in path_of(segments, leaf)]
        tokens = [t for segment in path for t in segment.token_ids.tolist()]
        expected = judge(models[BASE], [*prompt.token_ids.tolist(), *tokens], 0.8)[-len(tokens) :]
        found = np.concatenate([segment.behavior_logprobs for segment in path])
        assert np.abs(found - expected).max() < CLOSE


async def test_a_watched_request_ends_in_the_engine_and_keeps_its_log_probs(house, models):
    await house.use(BASE)
    prefix, seen = prompt_tokens(80, 20), []

    def is_over(token_ids):
        seen.append(list(token_ids))
        return len(token_ids) >= 32

    (completion,) = await house.client.extend(
        prefix,
        num_runs=1,
        max_new_tokens=CONTEXT - 40,
        sampling=SamplingSettings(1.0, ()),
        watch=Watch(8, lambda: is_over),
    )
    await wait_idle(house.server)
    tokens = completion.run.token_ids.tolist()
    assert 32 <= len(tokens) < CONTEXT - 40, "it was to end long before its limit"
    assert len(seen) >= 4
    assert all(tokens[: len(head)] == head for head in seen)
    assert gap_to(models[BASE], prefix, completion.run) < CLOSE


async def test_a_watched_request_that_runs_out_is_whole(house, models):
    await house.use(BASE)
    prefix = prompt_tokens(81, 20)
    (completion,) = await house.client.extend(
        prefix,
        num_runs=1,
        max_new_tokens=50,
        sampling=SamplingSettings(1.0, ()),
        watch=Watch(8, lambda: lambda _: False),
    )
    assert len(completion.run) == 50
    assert gap_to(models[BASE], prefix, completion.run) < CLOSE


async def test_a_prompt_is_put_into_the_cache_at_once_while_others_run(house):
    await house.use(BASE)
    prefixes = [prompt_tokens(90 + seed, 140) for seed in range(8)]
    engine = CountingClient(house.client)
    # prefilled in one batch with requests that want tokens
    others = [house.sample(prompt_tokens(110 + seed, 20)) for seed in range(8)]
    await asyncio.gather(*map(engine.warm, prefixes), *others)
    assert engine.num_requests == len(prefixes), "none was refused and asked for again"
    for prefix in prefixes:
        assert (await house.sample(prefix)).cached_tokens == 139


class CountingClient:
    """Warms prompts, and counts the requests that it took."""

    def __init__(self, client):
        self.client, self.num_requests = copy(client), 0
        self.client._request = self._counted
        self._request = client._request

    async def warm(self, prefix):
        await self.client.warm(prefix, sampling=SamplingSettings(1.0, (EOS,)))

    async def _counted(self, *arguments):
        self.num_requests += 1
        return await self._request(*arguments)


async def test_the_entropy_at_a_boundary_is_that_of_the_judge_up_to_its_tail(house, models):
    await house.use(BASE)
    prefix = prompt_tokens(82, 20)
    entropies = {}
    for num_top in (20, VOCAB_SIZE):
        (completion,) = await house.client.extend(
            prefix,
            num_runs=1,
            max_new_tokens=6,
            sampling=SamplingSettings(1.0, (), num_top),
        )
        before = [*prefix, *completion.run.token_ids.tolist()[:-1]]
        logprobs = models[BASE](_row(before)).logits[0, -1].log_softmax(-1).detach().double()
        entropies[num_top] = completion.entropy, float(-(logprobs.exp() * logprobs).sum())
    found, expected = entropies[VOCAB_SIZE]
    assert found == pytest.approx(expected, abs=1e-3)
    found, expected = entropies[20]
    assert found <= expected + 1e-4


async def test_an_update_changes_the_log_probs_and_leaves_no_prefix_of_the_old_weights(
    house, models
):
    await house.use(BASE)
    prefix = prompt_tokens(30, 64)
    await house.sample(prefix)
    assert (await house.sample(prefix)).cached_tokens == 63
    await house.use(FIRST)
    completion = await house.sample(prefix)
    assert completion.cached_tokens == 0
    assert completion.run.spans[0].policy_version == FIRST
    assert gap_to(models[FIRST], prefix, completion.run) < CLOSE
    assert gap_to(models[BASE], prefix, completion.run) > 0.1


async def test_without_a_flush_a_kept_namespace_would_mix_two_sets_of_weights(house, models):
    await house.use(FIRST)
    prefix = prompt_tokens(31, 64)
    await house.sample(prefix)
    body = {
        "model_path": str(house.store.path(SECOND)),
        "weight_version": str(FIRST),
        "flush_cache": False,
    }
    await house.server.post("/update_weights_from_disk", body, timeout_s=CALL_S)
    try:
        completion = await house.sample(prefix)
    finally:
        await house.server.flush_cache(timeout_s=CALL_S)
        await house.load(FIRST, as_version=FIRST)
    assert completion.cached_tokens == 63
    assert gap_to(models[SECOND], prefix, completion.run) > 0.01


async def test_the_probe_tells_right_weights_from_others(house):
    for version in (FIRST, SECOND):
        await house.use(version)
        other = FIRST if version == SECOND else SECOND
        assert await house.gap(version) < 1e-4
        assert await house.gap(other) > 1e-2


async def test_one_sequence_can_be_scored_alone(house, models):
    await house.use(BASE)
    (found,) = await house.server.score(PROBE[:1], timeout_s=CALL_S)
    assert np.abs(np.array(found) - judge(models[BASE], PROBE[0])).max() < CLOSE


async def test_the_checksum_names_the_weights(house):
    sums = {}
    for version in (BASE, FIRST, BASE):
        await house.use(version)
        found = await house.server.checksum(timeout_s=CALL_S)
        assert sums.setdefault(version, found) == found
    assert sums[BASE] != sums[FIRST]


async def test_a_partial_publication_is_refused_and_the_engine_would_have_taken_it(house, tmp_path):
    await house.use(BASE)
    whole = load_file(house.store.path(FIRST) / "model.safetensors")
    partial = tmp_path / str(FIRST)
    partial.mkdir()
    for file in ("config.json", "manifest.json"):
        (partial / file).write_bytes((house.store.path(FIRST) / file).read_bytes())
    half = {name: whole[name] for name in sorted(whole)[: len(whole) // 2]}
    save_file(half, partial / "model.safetensors", {"format": "pt"})

    with pytest.raises(WeightsError, match=r"model\.safetensors lacks "):
        verify(partial, model_tensors(house.store.path(BASE)))

    try:
        await house.server.load_weights(partial, "0.1", timeout_s=CALL_S)
        assert await house.gap(FIRST) > 1e-2, "told as a success, and wrong"
    finally:
        await house.load(BASE, as_version=BASE)


async def test_a_folder_that_is_not_there_is_an_engine_error_and_changes_nothing(house, tmp_path):
    await house.use(BASE)
    with pytest.raises(EngineError, match="/update_weights_from_disk answered 400"):
        await house.server.load_weights(tmp_path / "nowhere", "0.9", timeout_s=CALL_S)
    assert await house.gap(BASE) < 1e-4


async def test_a_cancelled_request_frees_the_engine(house):
    await house.use(BASE)
    prefix = prompt_tokens(40, 20)
    work = asyncio.ensure_future(
        house.client.extend(
            prefix,
            num_runs=8,
            max_new_tokens=CONTEXT - 40,
            sampling=SamplingSettings(1.0, ()),
        )
    )
    await asyncio.sleep(0.3)
    assert not await house.server.is_idle()
    begin = time.monotonic()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await wait_idle(house.server)
    assert time.monotonic() - begin < 2.0
    assert len((await house.sample(prefix)).run) > 0


async def test_without_the_key_nothing_but_its_health_is_told(house):
    options, right = house.server.options, bearer(read_key(house.server.options.key_file))
    answers = {}
    for name, headers in (("right", right), ("wrong", bearer("0" * 32)), ("none", {})):
        async with aiohttp.ClientSession(headers=headers) as session:
            for method, path in (
                ("POST", "/generate"),
                ("POST", "/update_weights_from_disk"),
                ("POST", "/abort_request"),
                ("GET", "/server_info"),
                ("GET", "/ready"),
            ):
                # no body: whoever gets through is told that one is missing
                async with session.request(method, house.server.url + path) as answer:
                    answers[name, path] = answer.status
    for name in ("wrong", "none"):
        statuses = {path: status for (who, path), status in answers.items() if who == name}
        assert statuses.pop("/ready") == 200
        assert set(statuses.values()) == {401}
    assert 401 not in {status for (name, _), status in answers.items() if name == "right"}
    key = read_key(options.key_file)
    assert not any(key in " ".join(p.cmdline()) for p in psutil.process_iter())


async def wait_idle(server):
    async with asyncio.timeout(10):
        while True:
            if await server.is_idle():
                return
            await asyncio.sleep(0.05)
