"""Weight updates of a real SGLang server under requests that run, wait and arrive, judged by Hugging Face transformers."""

import asyncio
import contextlib
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import pytest_asyncio

from tests.fakes import loopback, running, until
from tests.oracle import sequence_logprobs, tiny_qwen2
from treepo_async.actor.expand import ExpandSettings, expand
from treepo_async.engine.client import EngineClient, SamplingSettings
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.publications import FolderPublications
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.process import free_ports
from treepo_async.tree.rules import GrowthRules
from treepo_async.tree.stopping import StopRules
from treepo_async.types import PolicyVersion, Prompt
from treepo_async.weights.manifest import Probe, TensorInfo
from treepo_async.weights.store import NamedTensor, WeightStore

DRAIN, RETRACT, IN_PLACE = UpdateMode
VOCAB_SIZE, CONTEXT, SLOTS = 128, 512, 2
START_S, CALL_S = 150.0, 30.0
CLOSE, CLEAR = 1e-4, 0.1
"""Nats: what two float32 implementations may differ by, and what wrong weights do not stay below."""
LONG, SHORT = 440, 24
"""Tokens of a request that an update meets in its middle, and of one it does not."""
PROBE = [[7, 3, 99, 12, 4], [64, 2, 2, 31, 8, 8, 100, 5, 27, 33]]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(2 * START_S),
    pytest.mark.asyncio(loop_scope="module"),
]


class ObservedServer(Server):
    """A server that lets a test act between the moment requests are paused or gone and the load; counts its starts."""

    meanwhile = None
    num_starts = 0

    async def start(self, model_dir, weight_version, **options):
        self.num_starts += 1
        return await super().start(model_dir, weight_version, **options)

    async def load_weights(self, folder, weight_version, **options):
        if self.meanwhile is not None:
            await self.meanwhile()
        await super().load_weights(folder, weight_version, **options)


@dataclass
class OpenDoor:
    """Stands for the gate of a client that has not heard yet that it is closed."""

    version: PolicyVersion

    @contextlib.asynccontextmanager
    async def passage(self, least_step=0, *, patience_s=None):
        yield self.version

    async def stands_by(self, version, *, patience_s=None):
        return True


@dataclass
class House:
    """A host at work on a real server with `SLOTS` slots, and a client."""

    host: Host
    gate: GateClient
    session: aiohttp.ClientSession
    models: list
    probes: list
    config_file: Path
    seeds: random.Random = field(default_factory=lambda: random.Random(0))

    def set_mode(self, mode):
        self.host.rules = replace(self.host.rules, update_mode=mode)

    def client(self, gate=None):
        return EngineClient(
            self.host.server.url,
            gate or self.gate,
            self.session,
            namespace="run",
            vocab_size=VOCAB_SIZE,
            request_timeout_s=CALL_S,
            update_mode=self.host.rules.update_mode,
        )

    def prompt(self):
        """Tokens that no other test has put into the cache."""
        return [self.seeds.randrange(2, VOCAB_SIZE) for _ in range(48)]

    def submit(self, prompt, num_tokens, gate=None):
        """Begin to sample; gives a task of (prompt, run)."""

        async def sample():
            (completion,) = await self.client(gate).extend(
                prompt,
                num_runs=1,
                max_new_tokens=num_tokens,
                sampling=SamplingSettings(1.0, ()),
            )
            return prompt, completion.run

        return asyncio.create_task(sample())

    def model(self, version):
        return self.models[version.step % len(self.models)]

    def publish(self, *, probed=None):
        """The next version, with the probe that proves it, or another one."""
        version, _ = self.publish_in(self.host.publications.store, probed=probed)
        return version

    def publish_in(self, store, *, probed=None):
        version = PolicyVersion(0, self.host.applied.step + 1)
        folder = store.publish(
            version,
            tensors_of(self.model(version)),
            config_file=self.config_file,
            probe=Probe(PROBE, self.probes[(probed or version).step % len(self.probes)]),
            evaluate=False,
        )
        return version, folder

    async def applied(self, version):
        await until(lambda: self.host.applied == version, timeout_s=CALL_S)
        async with self.gate.passage(version.step):
            pass

    async def decoding(self, num_running):
        """Until so many requests run."""
        url = f"{self.host.server.url}/v1/loads?include=core"
        async with asyncio.timeout(CALL_S):
            while True:
                async with self.session.get(url) as answer:
                    (load,) = (await answer.json())["loads"]
                if load["num_running_reqs"] == num_running:
                    return
                await asyncio.sleep(0.01)

    def gaps(self, prompt, run):
        """Of each span of a run: its version, whether it is mixed, its largest gap to that version's judge."""
        found, begin = [], 0
        for span in run.spans:
            expected = judge(self.model(span.policy_version), [*prompt, *run.token_ids.tolist()])
            gaps = np.abs(run.behavior_logprobs - expected[-len(run) :])
            piece = gaps[begin : begin + span.num_tokens]
            found.append((span.policy_version, span.mixed_context, float(piece.max())))
            begin += span.num_tokens
        return found


def judge(model, token_ids):
    """Hugging Face's log-probs of all tokens but the first, [T - 1]."""
    return sequence_logprobs(model, token_ids).detach().numpy()


def tensors_of(model):
    return [
        NamedTensor(name, TensorInfo("F32", tuple(t.shape)), t.numpy().tobytes())
        for name, t in model.state_dict().items()
    ]


@pytest.fixture(scope="module")
def models():
    """Random models that share nothing but their shape; version n is model n modulo 3."""
    return [tiny_qwen2(tied=False, seed=seed).eval() for seed in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(models, tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("base")
    # a model that knows no end: every request has the length it asks for
    models[0].config.eos_token_id = models[0].generation_config.eos_token_id = None
    models[0].save_pretrained(base_dir)
    endpoint = loopback()
    async with aiohttp.ClientSession() as session:
        host = Host(
            server=ObservedServer(options(base_dir / "sglang.log"), session),
            keeper=GateKeeper(endpoint),
            publications=FolderPublications(
                WeightStore(tmp_path_factory.mktemp("weights"), keep=4)
            ),
            rules=HostRules(DRAIN, START_S, CALL_S, CALL_S, CALL_S, 2, 8, CLOSE),
            base_dir=base_dir,
            evaluates=False,
            evaluates_base=False,
        )
        try:
            async with (
                running(host.run()),
                GateClient(endpoint, name="a", evaluates=False, timeout_s=START_S) as gate,
            ):
                async with gate.passage():
                    pass
                probes = [[judge(model, ids).tolist() for ids in PROBE] for model in models]
                yield House(host, gate, session, models, probes, base_dir / "config.json")
        finally:
            host.keeper.shut()
            await host.server.stop()


def options(log_file):
    return ServerOptions(
        port=free_ports(1)[0],
        dtype="float32",
        context_length=CONTEXT,
        max_total_tokens=8192,
        max_running_requests=SLOTS,
        prefill_chunk_tokens=512,
        log_file=log_file,
        updates_under_load=True,
    )


@dataclass
class Update:
    """The requests that met an update, by what they did when it came; (prompt, run) each."""

    old: PolicyVersion
    new: PolicyVersion
    running: list
    queued: list
    during: list
    late: list
    """Arrived during the update under the version before, as their client had not heard of it."""
    after: list


async def update_under_load(house, mode):
    """Change weights while requests run, wait and arrive; some share their prompt."""
    house.set_mode(mode)
    old = house.host.applied
    prompts = [house.prompt() for _ in range(SLOTS)]
    during, late = [], []

    async def meanwhile():
        during.extend(house.submit(prompt, SHORT) for prompt in prompts)
        if mode is not DRAIN:
            late.extend(house.submit(prompt, SHORT, OpenDoor(old)) for prompt in prompts)
        await asyncio.sleep(0.2)

    house.host.server.meanwhile = meanwhile
    ran = [house.submit(prompt, LONG) for prompt in prompts]
    await house.decoding(SLOTS)
    queued = [house.submit(prompt, SHORT) for prompt in [prompts[0], house.prompt()]]
    await asyncio.sleep(0.05)
    new = house.publish()
    await house.applied(new)
    if mode is not DRAIN:
        assert not any(task.done() for task in ran), "the proof waited for whom it should not"
    house.host.server.meanwhile = None
    after = [house.submit(prompt, SHORT) for prompt in prompts]
    kinds = [await asyncio.gather(*tasks) for tasks in (ran, queued, during, late, after)]
    return Update(old, new, *kinds)


def spans_of(requests):
    return [[(s.policy_version, s.mixed_context) for s in run.spans] for _, run in requests]


def worst(house, requests, *, mixed):
    """Largest gap of each span that is or is not mixed."""
    return [
        gap
        for prompt, run in requests
        for _, is_mixed, gap in house.gaps(prompt, run)
        if is_mixed is mixed
    ]


async def test_drained_requests_are_each_of_the_version_they_were_submitted_under(house):
    it = await update_under_load(house, DRAIN)
    assert spans_of(it.running + it.queued) == [[(it.old, False)]] * 4
    assert spans_of(it.during + it.after) == [[(it.new, False)]] * 4
    everything = it.running + it.queued + it.during + it.after
    assert max(worst(house, everything, mixed=False)) < CLOSE


async def test_retracted_requests_have_the_log_probs_of_the_version_each_token_names(house):
    it = await update_under_load(house, RETRACT)
    assert spans_of(it.running) == [[(it.old, False), (it.new, False)]] * 2
    assert spans_of(it.queued + it.during + it.late + it.after) == [[(it.new, False)]] * 8
    everything = it.running + it.queued + it.during + it.late + it.after
    assert max(worst(house, everything, mixed=False)) < CLOSE


async def test_requests_updated_in_place_are_mixed_where_old_weights_had_a_part(house):
    it = await update_under_load(house, IN_PLACE)
    assert spans_of(it.running) == [[(it.old, False), (it.new, True)]] * 2
    assert spans_of(it.queued + it.late) == [[(it.new, True)]] * 4
    assert spans_of(it.during + it.after) == [[(it.new, False)]] * 4
    everything = it.running + it.queued + it.during + it.late + it.after
    assert max(worst(house, everything, mixed=False)) < CLOSE
    assert min(worst(house, it.running, mixed=True)) > CLEAR
    assert min(worst(house, [it.queued[0], *it.late], mixed=True)) > CLEAR, "shares an old prompt"


@pytest.mark.parametrize(("flush", "is_wrong"), [(True, False), (False, True)])
async def test_a_retraction_that_kept_the_cache_would_mix_two_sets_of_weights(
    house, tmp_path, flush, is_wrong
):
    """The control: the flush alone makes a retracted request, and one that shares its prompt, pure."""
    house.set_mode(RETRACT)
    await house.applied(house.publish())
    server, old, prompt = house.host.server, house.host.applied, house.prompt()
    # where the host does not look
    new, folder = house.publish_in(WeightStore(tmp_path, keep=1))
    ran = house.submit(prompt, LONG, OpenDoor(old))
    await house.decoding(1)
    try:
        await server.pause("retract", timeout_s=CALL_S)
        await server.load_weights(folder, str(new), timeout_s=CALL_S, flush=flush)
        await server.resume(timeout_s=CALL_S)
        shared = house.submit(prompt, SHORT, OpenDoor(old))
        for request in (await ran, await shared):
            version, mixed, gap = house.gaps(*request)[-1]
            assert (version, mixed) == (new, False)
            assert gap > CLEAR if is_wrong else gap < CLOSE
    finally:
        await server.flush_cache(timeout_s=CALL_S)
        await server.load_weights(
            house.host.publications.store.path(old), str(old), timeout_s=CALL_S
        )


SETTINGS = ExpandSettings(
    growth=GrowthRules(
        segment_tokens=8,
        max_depth=4,
        width=6,
        branching_factor=2,
        first_fork_min=2,
        first_fork_max=2,
        fallback="random",
    ),
    stops=StopRules(eos_token_ids=frozenset(), decode=str),
    sampling=SamplingSettings(1.0, ()),
)


@pytest.mark.parametrize("mode", UpdateMode)
async def test_trees_that_live_through_updates_have_segments_of_the_version_each_names(house, mode):
    house.set_mode(mode)
    client, trees = house.client(), []

    async def grow(seed):
        prompt = Prompt("p", np.array(house.prompt(), np.int32), "", "")
        segments, _ = await expand(
            prompt, client, SETTINGS, random.Random(seed), lease_id="l", actor="a", least_step=0
        )
        trees.append((prompt, segments))

    tasks = [asyncio.create_task(grow(seed)) for seed in range(4)]
    for _ in range(2):
        await asyncio.sleep(0.15)
        await house.applied(house.publish())
    await asyncio.gather(*tasks)
    versions, mixed = set(), []
    for prompt, segments in trees:
        for segment in segments:
            whole, parent = segment.token_ids.tolist(), segment.parent
            while parent != -1:
                whole, parent = [*segments[parent].token_ids, *whole], segments[parent].parent
            judged = judge(house.model(segment.policy_version), [*prompt.token_ids, *whole])
            gap = np.abs(segment.behavior_logprobs - judged[-len(segment) :]).max()
            assert segment.mixed_context or gap < CLOSE
            versions.add(segment.policy_version)
            mixed += [gap] * segment.mixed_context
    assert len(versions) > 1
    assert bool(mixed) == (mode is IN_PLACE)


async def test_weights_that_their_probe_belies_are_undone_by_a_restart_and_nobody_sees_them(house):
    house.set_mode(RETRACT)
    old = house.host.applied
    ran = house.submit(house.prompt(), LONG)
    await house.decoding(1)
    _, folder = house.publish_in(house.host.publications.store, probed=old)
    await until(lambda: house.host.server.num_starts == 2, timeout_s=CALL_S)
    folder.rename(folder.with_name(".withdrawn"))
    prompt, run = await ran
    assert spans_of([(prompt, run)]) == [[(old, False)]]
    assert max(worst(house, [(prompt, run)], mixed=False)) < CLOSE
    await house.applied(house.publish())
