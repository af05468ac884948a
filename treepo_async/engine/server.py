"""One SGLang server as a child process: its command line, its life, and its control calls over HTTP.

The server is a process of its own so that its crash is not ours; it dies with the host. Nothing here imports
sglang.
"""

import asyncio
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from treepo_async.config.limits import context_length
from treepo_async.config.schema import AnyConfig
from treepo_async.cpu.environment import cuda_present, environment, server_command
from treepo_async.errors import EngineError
from treepo_async.process import start_child, stop_child

POLL_S = 0.1
SCORE_PRIORITY = 100
"""Of a score; that of other requests is 0. SGLang lets a request take the place of another from a difference of 11."""
STOP_S = 3.0
"""A server that is told to end drains its requests first; beyond this it is killed. It has nothing to lose."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server is started with."""

    port: int
    dtype: str
    context_length: int
    max_total_tokens: int | None
    max_running_requests: int
    prefill_chunk_tokens: int
    log_file: Path
    updates_under_load: bool = False
    """Whether weights change while requests run or wait; see `command`."""
    key_file: Path | None = None
    """Of the key that it asks of its clients; see `api_key`. None: it asks for none."""
    tp: int = 1
    """Its ranks, each with a GPU."""
    load_format: str = "auto"
    """Where weights come from; `dummy`: from nowhere, for measuring."""
    host: str = "127.0.0.1"
    """Address to listen on."""


def options_of(
    config: AnyConfig,
    model: Mapping[str, Any],
    *,
    port: int,
    log_file: Path,
    updates_under_load: bool = False,
    key_file: Path | None = None,
    host: str = "127.0.0.1",
) -> ServerOptions:
    """What the config says of the server.

    Args:
        config: of a run, or of a stand-alone actor.
        model: the model's `config.json`.
        port: to listen on.
        log_file: takes the server's output.
        updates_under_load: see `command`.
        key_file: of the key that it asks of its clients.
        host: address to listen on.
    """
    engine = config.engine
    return ServerOptions(
        port=port,
        dtype=config.model.dtype,
        context_length=context_length(config, model),
        max_total_tokens=engine.max_total_tokens,
        max_running_requests=engine.max_running_requests,
        prefill_chunk_tokens=engine.prefill_chunk_tokens,
        log_file=log_file,
        updates_under_load=updates_under_load,
        key_file=key_file,
        tp=engine.tp,
        host=host,
    )


def command(
    options: ServerOptions, model_dir: Path, weight_version: str, *, cuda: bool
) -> list[str]:
    """The server's command line.

    `lpm` groups requests by cached prefix, which the default policy does not; without `sleep-on-idle` an idle
    scheduler keeps a core busy; warm-up is left out because the first tree serves as well.

    With updates under load the probe of new weights must not wait behind every request that came before it, so it
    has a priority; SGLang knows priorities in `fcfs` alone. And overlap scheduling, which prepares a decode step
    during the one before, would blur the token at which the weights changed.
    """
    flags = {
        "--model-path": str(model_dir),
        "--host": options.host,
        "--port": options.port,
        "--dtype": options.dtype,
        "--context-length": options.context_length,
        "--max-running-requests": options.max_running_requests,
        "--chunked-prefill-size": options.prefill_chunk_tokens,
        "--schedule-policy": "fcfs" if options.updates_under_load else "lpm",
        "--weight-version": weight_version,
        "--log-level": "warning",
    }
    if options.key_file is not None:
        flags["--config"] = str(options.key_file)
    if options.tp > 1:
        flags["--tp-size"] = options.tp
    if options.load_format != "auto":
        flags["--load-format"] = options.load_format
    if options.max_total_tokens is not None:
        flags["--max-total-tokens"] = options.max_total_tokens
    switches = [
        "--skip-tokenizer-init",
        "--skip-server-warmup",
        "--sleep-on-idle",
        "--enable-cache-report",
    ]
    if not cuda:
        flags |= {
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
        }
        switches += ["--disable-cuda-graph"]
    if options.updates_under_load:
        flags["--default-priority-value"] = 0
        switches += ["--enable-priority-scheduling"]
    if options.updates_under_load or not cuda:
        switches += ["--disable-overlap-schedule"]
    pairs = [str(word) for flag in flags.items() for word in flag]
    return [*server_command(cuda), *pairs, *switches]


def num_in_flight(loads: Sequence[Mapping[str, Any]]) -> int:
    """Requests that run or wait."""
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


class Server:
    """A running SGLang server. Start it from the main thread: it dies with the thread that started it."""

    def __init__(self, options: ServerOptions, session: aiohttp.ClientSession) -> None:
        """Prepare.

        Args:
            options: what to start it with.
            session: HTTP connections, with the key of `options.key_file` in their headers.
        """
        self.options = options
        self.url = f"http://{options.host}:{options.port}"
        self._session = session
        self._child: subprocess.Popen[bytes] | None = None
        self.incarnation = ""
        """Another one for each start."""
        self.groups: set[str] = set()
        """Of senders of weights, which it has joined since it was started."""

    async def start(self, model_dir: Path, weight_version: str, *, timeout_s: float) -> float:
        """Start with the weights in `model_dir` and wait until requests are taken. Gives the seconds it took.

        Raises:
            EngineError: it died or was not ready in time; carries the end of its log.
        """
        begin, cuda = time.monotonic(), cuda_present()
        self.incarnation = uuid.uuid4().hex
        self.groups.clear()
        env = environment(cuda, offline=True) | {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
        with self.options.log_file.open("ab") as log:
            self._child = start_child(
                command(self.options, model_dir, weight_version, cuda=cuda),
                env=env,
                stdout=log,
                stderr=log,
            )
        while not await self._is_ready():
            if not self.is_alive():
                raise EngineError(
                    f"SGLang ended with code {self._child.returncode} at start\n{self.log_tail()}"
                )
            if time.monotonic() - begin > timeout_s:
                raise EngineError(f"SGLang was not ready after {timeout_s:g} s\n{self.log_tail()}")
            await asyncio.sleep(POLL_S)
        await self._freeze_gc()
        return time.monotonic() - begin

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.poll() is None

    async def stop(self) -> None:
        """End it: by SIGTERM, then SIGKILL after `STOP_S`."""
        if self._child is not None:
            # stop_child waits; in a thread, so that peers are still answered meanwhile
            await asyncio.to_thread(stop_child, self._child, timeout_s=STOP_S)
            self._child = None

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of its log."""
        return "\n".join(self.options.log_file.read_text(errors="replace").splitlines()[-lines:])

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        """A control call with a JSON answer.

        Raises:
            EngineError: no answer in time, or a status other than 200.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.post(self.url + path, json=body, timeout=timeout) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EngineError(f"SGLang {path} answered {answer.status}: {text[:500]}")
                return await answer.json() if answer.content_type == "application/json" else text
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"SGLang {path}: {error!r}") from error

    async def _told(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> None:
        answer = await self.post(path, body, timeout_s=timeout_s)
        if answer.get("success") is not True:
            raise EngineError(f"SGLang {path}: {answer.get('message')}")

    async def flush_cache(self, *, timeout_s: float) -> None:
        """Drop all cached prefixes once the scheduler has retired every request.

        An answer reaches its client a little before the scheduler retires the request; without this barrier an
        update in that gap would leave old entries in the cache.
        """
        await self.post(f"/flush_cache?timeout={timeout_s:g}", {}, timeout_s=timeout_s + 5)

    async def pause(self, mode: str, *, timeout_s: float) -> None:
        """Stop decoding and take no request; those that run give up their KV cache (`retract`) or not (`in_place`).

        Whoever waits for an answer then waits without end: follow it by `resume` or `stop`.
        """
        await self.post("/pause_generation", {"mode": mode}, timeout_s=timeout_s)

    async def resume(self, *, timeout_s: float) -> None:
        """Go on after `pause`."""
        await self.post("/continue_generation", {}, timeout_s=timeout_s)

    async def load_weights(
        self, folder: Path, weight_version: str, *, timeout_s: float, flush: bool = True
    ) -> None:
        """Load a publication; only with no request running, or paused.

        Args:
            folder: of the publication.
            weight_version: what tokens sampled from now on are said to be of.
            timeout_s: of the call.
            flush: also drop all cached prefixes; not possible after `pause("in_place")`, where SGLang would answer
                with a failure and have swapped the weights all the same.

        Raises:
            EngineError: SGLang did not load it, or loaded it and kept old cache entries.
        """
        body = {"model_path": str(folder), "weight_version": weight_version, "flush_cache": flush}
        answer = await self.post("/update_weights_from_disk", body, timeout_s=timeout_s)
        if answer.get("success") is not True:
            raise EngineError(f"SGLang refused {folder}: {answer.get('message')}")

    async def join_group(
        self, name: str, address: str, port: int, *, tp: int, timeout_s: float
    ) -> None:
        """Have all ranks join a group whose rank 0 is a sender of weights; it must be there, or SGLang freezes until it is.

        Args:
            name: of the group.
            address: where the sender is.
            port: where it listens.
            tp: ranks of this server.
            timeout_s: of the call.

        Raises:
            EngineError: they did not join in time; the server may be frozen.
        """
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": tp + 1,
            "group_name": name,
            "backend": "nccl" if cuda_present() else "gloo",
        }
        await self._told("/init_weights_update_group", body, timeout_s=timeout_s)
        self.groups.add(name)

    async def begin_update(self, *, timeout_s: float) -> None:
        """From now on buckets may come.

        Raises:
            EngineError: SGLang refused.
        """
        await self._told("/begin_weight_update", {}, timeout_s=timeout_s)

    async def receive_bucket(
        self,
        group: str,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        weight_version: str | None,
        flush: bool,
        timeout_s: float,
    ) -> None:
        """Take a bucket that is being broadcast, and load its tensors.

        Args:
            group: that it comes by.
            names: of the tensors, in the order of their bytes.
            dtypes: of each, as torch spells it.
            shapes: of each.
            weight_version: what tokens sampled from now on are said to be of; None: as before.
            flush: also drop all cached prefixes; see `load_weights`.
            timeout_s: of the call.

        Raises:
            EngineError: SGLang did not take or load it; its weights may be a mixture.
        """
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group,
            "load_format": "flattened_bucket",
            "weight_version": weight_version,
            "flush_cache": flush,
        }
        await self._told("/update_weights_from_distributed", body, timeout_s=timeout_s)

    async def end_update(self, *, timeout_s: float) -> None:
        """No more buckets come.

        Raises:
            EngineError: SGLang refused.
        """
        await self._told("/end_weight_update", {}, timeout_s=timeout_s)

    async def checksum(self, *, timeout_s: float) -> str:
        """A hash over all loaded tensors, equal for equal weights in any process."""
        answer = await self.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
        return str(answer["per_engine_checksum"])

    async def score(
        self, sequences: Sequence[Sequence[int]], *, timeout_s: float
    ) -> list[list[float]]:
        """Log-prob of each token but the first, per sequence, at temperature 1; reads nothing from the prefix cache.

        With `updates_under_load` it goes before all other requests, and in the place of running ones if there is no
        other; they go on after it. Its cache namespace is its own: a sequence longer than a prefill chunk would else
        go on from the cache entries of a score under other weights.
        """
        body = {
            "input_ids": [list(s) for s in sequences],
            "extra_key": uuid.uuid4().hex,
            "priority": SCORE_PRIORITY,
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        }
        answers = await self.post("/generate", body, timeout_s=timeout_s)
        return [[row[0] for row in a["meta_info"]["input_token_logprobs"][1:]] for a in answers]

    async def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return num_in_flight(await self.loads()) == 0

    async def loads(self) -> list[dict[str, Any]]:
        """SGLang's own counters, one a rank (fresh within 0.1 s while it works, 1.4 ms a call).

        They carry the time at which the scheduler wrote them: one that hangs leaves them as they were.
        """
        url, timeout = f"{self.url}/v1/loads?include=core", aiohttp.ClientTimeout(total=2.0)
        try:
            async with self._session.get(url, timeout=timeout) as answer:
                answer.raise_for_status()
                loads: list[dict[str, Any]] = (await answer.json())["loads"]
        except (aiohttp.ClientError, TimeoutError, LookupError, TypeError, ValueError) as error:
            raise EngineError(f"SGLang /v1/loads: {error!r}") from error
        return loads

    async def _freeze_gc(self) -> None:
        """Exempt what is loaded now from garbage collection, which a cache flush runs: 2 ms instead of 0.4 s.

        SGLang means to do so by itself at start, but often asks before its own port is open, and gives up.
        """
        await self.post("/freeze_gc", {}, timeout_s=30)

    async def _is_ready(self) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=2.0)
            async with self._session.get(f"{self.url}/ready", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False
