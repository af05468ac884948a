"""Small real stand-ins: an engine that answers by rule, an SGLang over HTTP with faults, a replay to talk to.

Each keeps to the protocol of what it stands for and records what it was asked; nothing is patched.
"""

import asyncio
import contextlib
import json
import math
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from aiohttp import ClientSession, web
from aiohttp.typedefs import Handler

from treepo_async.actor.expand import ExpandSettings
from treepo_async.actor.score import Scoring
from treepo_async.engine.answer import Completion, Watch
from treepo_async.engine.client import SamplingSettings
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.routing import Place
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.errors import EngineError
from treepo_async.metrics.events import parse
from treepo_async.process import free_ports
from treepo_async.replay.dead_letters import DeadLetters
from treepo_async.replay.feed import TreeFeed
from treepo_async.replay.group import Group
from treepo_async.replay.peers import Peers
from treepo_async.replay.quarantine import Quarantine
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.server import ReplayServer, ServerLimits
from treepo_async.replay.store import Store
from treepo_async.scoring.async_scorer import Inline
from treepo_async.scoring.boxed import boxed_end
from treepo_async.scoring.registry import Scorer
from treepo_async.scoring.reward import RewardRules
from treepo_async.tree.cut import Run, VersionSpan
from treepo_async.tree.rules import GrowthRules
from treepo_async.tree.stopping import StopRules
from treepo_async.types import PolicyVersion, Prompt
from treepo_async.weights.manifest import Probe, TensorInfo
from treepo_async.weights.store import NamedTensor, WeightStore
from treepo_async.wire.sockets import Router

BASE = PolicyVersion(0, 0)
EOS = 1
VOCAB_SIZE = 128
MAX_DRAWN = 64
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_theta": 300.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
"""What a small model's `config.json` says."""
HELD_S = 60.0
"""A request that hangs is let go after this time, in case a test forgot it."""


def events_in(output: str, name: str | None = None) -> list[dict[str, Any]]:
    """The events in captured output, all or those of one name."""
    found = [event for line in output.splitlines() if (event := parse(line)) is not None]
    return [event for event in found if name in (None, event["event"])]


async def until(holds: Callable[[], Any], *, timeout_s: float = 10.0) -> None:
    """Wait until `holds()`; fails at the deadline."""
    async with asyncio.timeout(timeout_s):
        while True:
            if holds():
                return
            await asyncio.sleep(0.01)


def text_of(token_ids: Sequence[int]) -> str:
    """The fake vocabulary is ASCII: a token is its character, those below the space are nothing."""
    return "".join(chr(token) for token in token_ids if token >= ord(" "))


def ascii_settings(**rules: Any) -> ExpandSettings:
    """Trees of 6 leaves with segments of 4 tokens, 5 deep; `rules` replaces some of the growth's."""
    defaults = {
        "segment_tokens": 4,
        "max_depth": 5,
        "width": 6,
        "branching_factor": 2,
        "first_fork_min": 2,
        "first_fork_max": 2,
        "fallback": "random",
    }
    return ExpandSettings(
        growth=GrowthRules(**{**defaults, **rules}),
        stops=StopRules(
            eos_token_ids=frozenset({EOS}),
            decode=text_of,
            boxed_end=boxed_end,
            repetition_window=2,
            repetition_count=2,
        ),
        sampling=SamplingSettings(temperature=0.8, stop_token_ids=(EOS,)),
    )


def scoring_by(scorer: Scorer) -> Scoring:
    """Scores of a function, as rewards 1 and -1, without an overlong penalty."""
    return Scoring(Inline(scorer), text_of, RewardRules(1.0, -1.0, max_response_tokens=20))


def loopback() -> str:
    """A free endpoint for sockets."""
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


# ---------------------------------------------------------------- engine


@dataclass(frozen=True)
class Request:
    """One call of `ScriptedEngine.extend`."""

    prefix: list[int]
    num_runs: int
    max_new_tokens: int
    sampling: SamplingSettings
    least_step: int
    is_cached: bool
    is_watched: bool = False


@dataclass
class ScriptedEngine:
    """An `actor.expand.Engine` whose completions follow from its script, or from a seeded toy policy.

    With `script`, a function of prefix, run number and greediness gives the tokens of each run. Without it, tokens
    are drawn uniformly, and a run ends with `EOS` with probability `eos_rate` at each token. `logprob_of` of token and
    position is what the engine reports, so that a test knows every log-prob without asking.
    """

    script: Callable[[list[int], int, bool], Sequence[int]] | None = None
    seed: int = 0
    eos_rate: float = 0.1
    version: PolicyVersion = BASE
    """That samples, unless a later one is asked for."""
    obeys_least_step: bool = True
    failures: dict[int, Exception] = field(default_factory=dict)
    """What calls raise, by their number from 0."""
    held: dict[int, asyncio.Event] = field(default_factory=dict)
    """Calls whose prefix begins with the token wait for its event."""
    requests: list[Request] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)
    """All tokens returned, in the order of return."""
    warmed: list[list[int]] = field(default_factory=list)
    """Prefixes put into the cache."""
    _num_runs: Counter[tuple[int, ...]] = field(default_factory=Counter)

    async def warm(
        self, prefix: Sequence[int], *, sampling: SamplingSettings, least_step: int = 0
    ) -> Place:
        """See `EngineClient.warm`."""
        self.warmed.append(list(prefix))
        return Place("")

    async def extend(
        self,
        prefix: Sequence[int],
        *,
        num_runs: int,
        max_new_tokens: int,
        sampling: SamplingSettings,
        least_step: int = 0,
        is_cached: bool = True,
        watch: Watch | None = None,
        arrived: dict[int, Completion] | None = None,
        home: Place | None = None,
    ) -> list[Completion]:
        """See `EngineClient.extend`; a watch looks at the first token and after every `every_tokens` more."""
        prefix, call, is_watched = list(prefix), len(self.requests), watch is not None
        self.requests.append(
            Request(prefix, num_runs, max_new_tokens, sampling, least_step, is_cached, is_watched)
        )
        await asyncio.sleep(0)
        if prefix[0] in self.held:
            await self.held[prefix[0]].wait()
        if call in self.failures:
            raise self.failures[call]
        return [
            self._complete(prefix, max_new_tokens, sampling, is_cached, least_step, watch)
            for _ in range(num_runs)
        ]

    def _version_for(self, least_step: int) -> PolicyVersion:
        wanted = PolicyVersion(0, least_step if self.obeys_least_step else 0)
        return max(self.version, wanted)

    def _complete(
        self,
        prefix: list[int],
        max_new_tokens: int,
        sampling: SamplingSettings,
        is_cached: bool,
        least_step: int,
        watch: Watch | None,
    ) -> Completion:
        number, is_greedy = self._num_runs[tuple(prefix)], sampling.temperature == 0
        self._num_runs[tuple(prefix)] += 1
        wanted = (self.script or self._draw)(prefix, number, is_greedy)
        tokens = list(wanted)[:max_new_tokens]
        if watch is not None:
            is_over, looks = watch.begin(), range(1, len(tokens), watch.every_tokens)
            tokens = tokens[: next((n for n in looks if is_over(tokens[:n])), len(tokens))]
        self.runs.append(tokens)
        logprobs = [logprob_of(token, len(prefix) + i) for i, token in enumerate(tokens)]
        return Completion(
            run=Run(
                np.array(tokens, np.int32),
                np.array(logprobs, np.float32),
                (VersionSpan(self._version_for(least_step), len(tokens)),),
            ),
            prefix_tokens=len(prefix),
            cached_tokens=len(prefix) - 1 if is_cached else 0,
            overhead_s=0.001,
            entropy=1.0 if sampling.num_top_logprobs else None,
        )

    def _draw(self, prefix: list[int], number: int, is_greedy: bool) -> list[int]:
        rng = random.Random(f"{self.seed}/{prefix}/{0 if is_greedy else number}")
        tokens = []
        while len(tokens) < MAX_DRAWN and EOS not in tokens:
            tokens.append(EOS if rng.random() < self.eos_rate else rng.randrange(2, VOCAB_SIZE))
        return tokens


def logprob_of(token: int, position: int) -> float:
    """The log-prob that `ScriptedEngine` reports for a token at a position of its sequence."""
    return -0.01 - 0.001 * (token % 97) - 0.0001 * (position % 89)


# ---------------------------------------------------------------- SGLang over HTTP


@dataclass
class FakeSGLang:
    """The endpoints of an SGLang server that this project uses, with faults to be set.

    The faults of `generate_faults` are used up one a request: `abort`, `500`, `garbage`, `not_understood`, `drop`,
    `other_version`, `nan`, `short`, `hang`. Weights are one number, `level`: every log-prob is `fake_logprob(token, level)`.
    """

    generate_faults: deque[str] = field(default_factory=deque)
    refuses_update: bool = False
    refuses_flush: bool = False
    ignores_update: bool = False
    """Say that new weights were loaded, and keep the old ones: what SGLang does with a partial file."""
    refuses_resume: bool = False
    weight_versions: list[dict[str, Any]] | None = None
    """What answers say of their versions; by default the one at submission, up to the half, and the one now."""
    latency_s: float = 0.0
    probe_s: float = 0.0
    """How long the scores of a probe take."""
    version: str = "0.0"
    level: float = 0.0
    vocab_size: int = VOCAB_SIZE
    is_hung: bool = False
    """Take requests and answer none, until it is started again."""
    dies_of: int | None = None
    """A prompt with this token ends the server, and all that runs in it."""
    on_death: Callable[[], None] = lambda: None
    num_missed: int = 0
    """Times that it is looked for in vain, at `/model_info`; until then every connection breaks, as if it were not there."""
    info: dict[str, Any] = field(default_factory=dict)
    """What it says of itself beside the defaults, at `/model_info` and `/server_info`."""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """(path, body) in order of arrival."""
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    """Live requests by id; the event aborts one."""
    paused: str = ""
    """The mode of the pause; while there is one, no request ends and none is taken."""
    url: str = ""
    _runner: web.AppRunner | None = None
    _lost: set[str] = field(default_factory=set)
    """Ids of requests that died with the server."""

    async def __aenter__(self) -> "FakeSGLang":
        app = web.Application(middlewares=[self._unless_away])
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        app.router.add_post("/update_weights_from_disk", self._update)
        app.router.add_post("/weights_checker", self._checksum)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        port = free_ports(1)[0]
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for abort in self.running.values():
            abort.set()
        assert self._runner is not None
        await self._runner.cleanup()

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path."""
        return [body for called, body in self.calls if called == path]

    @web.middleware
    async def _unless_away(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.num_missed == 0:
            return await handler(request)
        self.num_missed -= request.path == "/model_info"
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls.append(("/generate", body))
        await until(lambda: not self.paused, timeout_s=HELD_S)
        if isinstance(body["input_ids"][0], list):
            await asyncio.sleep(self.probe_s)
            return web.json_response([self._scored(ids) for ids in body["input_ids"]])
        if self.dies_of in body["input_ids"]:
            self._die(request)
            return web.Response()
        if outside := [t for t in body.get("token_ids_logprob", ()) if t >= self.vocab_size]:
            text = (
                f"out-of-vocabulary token id {outside[0]}; valid range is [0, {self.vocab_size})."
            )
            return web.json_response({"error": {"message": text}}, status=400)
        if body.get("stream"):
            return await self._stream(request, body)
        fault = self.generate_faults.popleft() if self.generate_faults else ""
        version = self.version
        abort = self.running[body["rid"]] = asyncio.Event()
        try:
            wait_s = HELD_S if fault == "hang" or self.is_hung else self.latency_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await abort.wait()
            await until(lambda: not self.paused, timeout_s=HELD_S)
            if abort.is_set():
                fault = "drop" if body["rid"] in self._lost else "abort"
            return self._completion(request, body, fault, version)
        finally:
            del self.running[body["rid"]]

    def _completion(
        self, request: web.Request, body: dict[str, Any], fault: str, version: str
    ) -> web.StreamResponse:
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
        if fault == "500":
            return web.json_response({"error": {"message": "scheduler trouble"}}, status=500)
        if fault == "garbage":
            return web.Response(body=b"\xff{]", content_type="application/json")
        if fault == "not_understood":
            return web.json_response({"text": "no meta_info here"})
        params = body["sampling_params"]
        number = params["max_new_tokens"]
        tokens = [2 + i % (VOCAB_SIZE - 2) for i in range(number - (fault == "short"))]
        logprobs = [None if fault == "nan" else fake_logprob(t, self.level) for t in tokens]
        said = ["0.999"] * 2 if fault == "other_version" else [version, self.version]
        reason = {"type": "length", "length": number}
        if fault == "abort":
            reason = {"type": "abort", "message": "Aborted"}
        meta = {
            "id": body["rid"],
            "finish_reason": reason,
            "prompt_tokens": len(body["input_ids"]),
            "cached_tokens": len(body["input_ids"]) - 1,
            "weight_version": said[1],
            "weight_versions": self.weight_versions or fake_spans(*said, number),
            "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, tokens, strict=True)],
            "e2e_latency": 0.001,
        }
        if number == 0:
            # SGLang's habit while other requests run
            meta["output_token_logprobs"] = [[-0.5, 2, None]]
        if "top_logprobs_num" in body:
            row = [[math.log(0.5), 2, None], [math.log(0.25), 3, None]]
            meta["output_top_logprobs"] = [row] * number
        return web.json_response({"output_ids": tokens, "meta_info": meta})

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """All tokens so far at every interval; an abort ends it two tokens later."""
        answer = self._completion(request, body, "", self.version)
        assert isinstance(answer, web.Response)
        whole = json.loads(answer.body)
        response = web.StreamResponse()
        await response.prepare(request)
        abort = self.running[body["rid"]] = asyncio.Event()
        number, every = len(whole["output_ids"]), body["sampling_params"]["stream_interval"]
        fault = self.generate_faults.popleft() if self.generate_faults else ""
        for sent in range(1, number, every):
            await response.write(_event(_head(whole, sent, None)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.latency_s):
                    await abort.wait()
            if abort.is_set():
                number = min(number, sent + 2)
                break
        del self.running[body["rid"]]
        reason = {"type": "abort", "message": "Aborted"} if abort.is_set() else {"type": "length"}
        if fault == "abort":
            reason = {"type": "abort", "message": "somebody else's"}
        last = _head(whole, number, reason)
        if fault == "waits":
            # aborted in the queue, where SGLang keeps requests whose KV cache it took
            for name in ("prompt_tokens", "cached_tokens", "e2e_latency"):
                del last["meta_info"][name]
        if fault != "drop":
            await response.write(_event(last) + b"data: [DONE]\n\n")
        return response

    def _scored(self, ids: list[int]) -> dict[str, Any]:
        rows = [[None, ids[0], None], *([fake_logprob(t, self.level), t, None] for t in ids[1:])]
        return {"output_ids": [], "meta_info": {"input_token_logprobs": rows}}

    async def _abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(("/abort_request", body))
        for request_id, abort in self.running.items():
            if request_id.startswith(body["rid"]):
                abort.set()
        return web.Response()

    async def _flush(self, request: web.Request) -> web.Response:
        self.calls.append(("/flush_cache", dict(request.query)))
        if not self.refuses_flush:
            with contextlib.suppress(TimeoutError):
                await until(lambda: not self.running, timeout_s=float(request.query["timeout"]))
        if self.refuses_flush or self.running:
            return web.Response(text="Timed out waiting for idle state.", status=400)
        return web.Response(text="Cache flushed.\n")

    async def _pause(self, request: web.Request) -> web.Response:
        self.paused = (await request.json())["mode"]
        self.calls.append(("/pause_generation", self.paused))
        return web.json_response({"status": "ok", "message": "Generation paused successfully."})

    async def _continue(self, request: web.Request) -> web.Response:
        self.calls.append(("/continue_generation", await request.json()))
        if self.refuses_resume:
            return web.json_response({"object": "error", "message": "no"}, status=400)
        self.paused = ""
        return web.json_response({"status": "ok", "message": "Generation continued successfully."})

    async def _update(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(("/update_weights_from_disk", body))
        if self.refuses_update:
            answer = {"success": False, "message": "Failed to get weights iterator"}
            return web.json_response(answer, status=400)
        if not self.ignores_update:
            self.level = level_of(Path(body["model_path"]))
        self.version = body["weight_version"]
        if self.paused == "in_place" and body["flush_cache"]:
            answer = {"success": False, "message": "Weights were updated, but the cache was not"}
            return web.json_response(answer, status=400)
        return web.json_response({"success": True, "message": "Succeeded."})

    async def _checksum(self, _: web.Request) -> web.Response:
        return web.json_response({"success": True, "per_engine_checksum": f"level {self.level}"})

    async def _loads(self, _: web.Request) -> web.Response:
        load = {"num_running_reqs": len(self.running), "num_waiting_reqs": 0}
        if self.running and not self.is_hung:
            load["timestamp"] = time.monotonic()
        return web.json_response({"loads": [load]})

    async def _ready(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.paused else 200)

    async def _model_info(self, _: web.Request) -> web.Response:
        said = {"model_path": "a/model", "weight_version": self.version, "is_generation": True}
        return web.json_response(said | self.info)

    async def _server_info(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.5.23", "context_length": 64} | self.info)

    def _die(self, request: web.Request) -> None:
        self.on_death()
        self._lost |= self.running.keys()
        for abort in self.running.values():
            abort.set()
        assert request.transport is not None
        request.transport.abort()


def _event(answer: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(answer).encode() + b"\n\n"


def _head(answer: dict[str, Any], number: int, reason: dict[str, Any] | None) -> dict[str, Any]:
    """The answer after that many tokens; only the last one says how long it took."""
    meta = dict(answer["meta_info"], finish_reason=reason)
    meta["output_token_logprobs"] = meta["output_token_logprobs"][:number]
    meta["weight_versions"] = fake_spans(meta["weight_version"], meta["weight_version"], number)
    if reason is None:
        del meta["e2e_latency"]
    return {"output_ids": answer["output_ids"][:number], "meta_info": meta}


class FakeServer(Server):
    """A `Server` whose process is a `FakeSGLang`; its control calls are the real ones, over HTTP."""

    def __init__(self, fake: FakeSGLang, session: ClientSession, log_file: Path) -> None:
        log_file.write_text("a line of its log\n")
        super().__init__(
            ServerOptions(int(fake.url.rpartition(":")[2]), "float32", 64, None, 8, 64, log_file),
            session,
        )
        self.fake, self.is_running = fake, False
        fake.on_death = self.die
        self.starts: list[tuple[Path, str]] = []

    async def start(self, model_dir: Path, weight_version: str, *, timeout_s: float) -> float:
        """Be an SGLang that has loaded the folder."""
        self.starts.append((model_dir, weight_version))
        self.fake.calls.append(("start", weight_version))
        self.fake.version, self.fake.level = weight_version, level_of(model_dir)
        self.fake.paused, self.fake.is_hung = "", False
        self.is_running = True
        return 0.0

    def is_alive(self) -> bool:
        """Whether nobody has set `is_running` to False."""
        return self.is_running

    def die(self) -> None:
        """Be gone without having been told to."""
        self.is_running = False

    async def stop(self) -> None:
        """End it, and the requests in it."""
        self.is_running = False
        for abort in self.fake.running.values():
            abort.set()


def fake_logprob(token: int, level: float) -> float:
    """The log-prob of a token under weights of a level."""
    return -0.5 - 0.01 * token - level


def fake_spans(first: str, last: str, num_tokens: int) -> list[dict[str, Any]]:
    """SGLang's spans of a request that began under one version and ended, from the half on, under another."""
    half = num_tokens if first == last else num_tokens // 2
    spans = [{"version": first, "start": 0, "end": half}]
    return spans + [{"version": last, "start": half, "end": num_tokens}] * (half < num_tokens)


def fake_tensors(level: float) -> list[NamedTensor]:
    """The weights of a `FakeSGLang`."""
    data = np.full((2, 3), level, np.float32).tobytes()
    return [NamedTensor("model.weight", TensorInfo("F32", (2, 3)), data)]


def level_of(folder: Path) -> float:
    """The level in a folder's weights, as an engine would load them: unchecked."""
    data = (folder / "model.safetensors").read_bytes()
    return float(np.frombuffer(data[-4:], np.float32)[0])


def publish_fake(
    store: WeightStore,
    version: PolicyVersion,
    *,
    evaluate: bool = False,
    probe_level: float | None = None,
) -> Path:
    """Publish weights whose level is the version's step, with the probe that proves them, or one of another level."""
    level = float(version.step)
    token_ids = [[2, 3, 5, 7], [11, 13, 17]]
    proven = level if probe_level is None else probe_level
    logprobs = [[fake_logprob(t, proven) for t in ids[1:]] for ids in token_ids]
    config_file = store.folder.parent / "config.json"
    config_file.write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return store.publish(
        version,
        fake_tensors(level),
        config_file=config_file,
        probe=Probe(token_ids, logprobs),
        evaluate=evaluate,
    )


# ---------------------------------------------------------------- gate and replay


@contextlib.asynccontextmanager
async def running(work: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a coroutine beside the test; what it raised by itself is raised at the end."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        ended = task.done()
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if ended and isinstance(outcome, Exception):
        raise outcome


@contextlib.asynccontextmanager
async def open_gate(
    version: PolicyVersion = BASE,
    *,
    evaluates: bool = False,
    timeout_s: float = 5.0,
    silent_s: float = 5.0,
) -> AsyncIterator[tuple[GateKeeper, GateClient]]:
    """A keeper with an open gate and one client of it, which has seen it open."""
    endpoint = loopback()
    keeper = GateKeeper(endpoint, silent_s=silent_s)
    try:
        async with running(keeper.serve()):
            await keeper.open(version, evaluate=False, hold_s=0)
            async with GateClient(
                endpoint, name="actor-0", evaluates=evaluates, timeout_s=timeout_s
            ) as gate:
                async with gate.passage():
                    pass
                yield keeper, gate
    finally:
        keeper.shut()


LIMITS = ServerLimits(vocab_size=VOCAB_SIZE, max_lost=8, max_tree_bytes=2**20, max_disk_bytes=2**30)
"""Of a replay in tests."""


@contextlib.asynccontextmanager
async def serve_replay(
    *,
    prompt: Callable[[int], Prompt] | None = None,
    endpoint: str | None = None,
    folder: Path | None = None,
    resume_step: int | None = None,
    run_id: str = "run",
    on_disk: bool = True,
    limits: ServerLimits = LIMITS,
    make_feed: Callable[[Group], TreeFeed] | None = None,
    server_type: type[ReplayServer] = ReplayServer,
    **rules: Any,
) -> AsyncIterator[tuple[ReplayServer, str]]:
    """A real replay. Gives the server and its endpoint.

    Called again with the same endpoint and folder, it is that replay started anew.

    Args:
        prompt: the training prompts; by default prompt i is the tokens `[10 + i, 7]`.
        endpoint: by default a free one.
        folder: of its store; by default one that is gone in the end.
        resume_step: of the checkpoint that the run goes on from.
        run_id: of the run.
        on_disk: whether trees outlive it.
        limits: of the server.
        make_feed: gives the trees of a file.
        server_type: what serves.
        rules: of the queue; the defaults are one batch of two prompts.
    """
    defaults = {
        "prompts_per_batch": 2,
        "max_staleness": 0,
        "num_batches": 1,
        "lease_timeout_s": 30.0,
        "max_attempts": 3,
        "drop_degenerate": False,
        "max_refills": 8,
    }
    endpoint = endpoint or loopback()
    with contextlib.ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store, state = Store.open(
            folder, run_id, resume_step=resume_step, segment_bytes=2**20, keeps_trees=on_disk
        )
        stack.callback(store.close)
        router = await _bound(endpoint)
        stack.callback(router.close)
        server = server_type(
            router=router,
            queue=Queue.of(QueueRules(**{**defaults, **rules}), state, now=time.monotonic()),
            store=store,
            peers=Peers(run_id=run_id, config_digest="", tokenizer_digest=""),
            prompt=prompt or numbered_prompt,
            limits=limits,
            dead_letters=DeadLetters(folder),
            quarantine=Quarantine(folder / "quarantine", 8),
            make_feed=make_feed,
        )
        async with running(server.run()):
            yield server, endpoint


async def _bound(endpoint: str) -> Router:
    """A router, once whoever had the endpoint before has let go of it, which sockets do behind one's back."""
    async with asyncio.timeout(HELD_S):
        while True:
            try:
                return Router(endpoint, max_bytes=2**20)
            except zmq.ZMQError:
                await asyncio.sleep(0.02)


def numbered_prompt(index: int) -> Prompt:
    """The prompt of an index: tokens `[10 + index, 7]`."""
    return Prompt(f"p{index}", np.array([10 + index, 7], np.int32), f"problem {index}", "1")


def engine_failure() -> EngineError:
    """What a lost engine raises."""
    return EngineError("no completion after 3 attempts: the server is gone")
