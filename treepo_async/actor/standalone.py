"""A stand-alone actor: every prompt's tree into a file, with no other process than an engine.

Composes what an actor of a run has (`grow`, `score`) with an engine of fixed weights, the file and its progress. Waits:
for the engine to start (`engine.start_timeout_s`), then for the last prompt (see `generation`). The first SIGINT or
SIGTERM ends it in order: running requests are aborted, finished trees are on disk. The second one ends it at once.
"""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import aiohttp

from treepo_async.actor.endings import Outcome
from treepo_async.actor.expand import Engine
from treepo_async.actor.generation import Generation
from treepo_async.actor.grow import Grower
from treepo_async.actor.job import Job
from treepo_async.actor.output import Output, beside
from treepo_async.actor.printer import Printer
from treepo_async.actor.score import Scoring, open_scoring
from treepo_async.actor.settings import expand_settings
from treepo_async.actor.tally import Tally
from treepo_async.config.limits import (
    context_length,
    engine_urls,
    prompt_limit,
    response_limit,
)
from treepo_async.config.schema import GenerateConfig
from treepo_async.config.wiring import ENGINE_KEY_FILE
from treepo_async.data.source import FileOrder, Skipped
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.engine.api_key import bearer, ensure_key, read_key
from treepo_async.engine.client import EngineClient
from treepo_async.engine.fixed import FixedEngine
from treepo_async.engine.fleet import RemoteFleet
from treepo_async.engine.kept import KeptEngine
from treepo_async.engine.pool import EnginePool, Member
from treepo_async.engine.remote import RemoteEngine
from treepo_async.engine.server import Server, options_of
from treepo_async.errors import DataError
from treepo_async.process import free_ports
from treepo_async.types import Prompt

NAME = "standalone"
"""Of the actor, in the provenance of its trees."""
SYNC_S = 1.0
TICK_S = 0.5
EXIT_STOPPED = 130


class StoppedError(KeyboardInterrupt):
    """A signal ended the work."""


@dataclass(frozen=True)
class Inputs:
    """What the work needs, checked."""

    config: GenerateConfig
    model_dir: Path
    model: dict[str, Any]
    """Its `config.json`."""
    tokenizer: TextTokenizer
    prompts: FileOrder
    prompt_ids: frozenset[str]
    """Of all prompts of the job, unusable ones included."""
    job: Job

    @classmethod
    def of(cls, config: GenerateConfig, model_dir: Path, model: dict[str, Any]) -> Self:
        """Open model and data, and go once through the data.

        Raises:
            ConfigError, DataError: naming the key or the file, and what would do.
        """
        tokenizer = TextTokenizer.load(model_dir)
        limit = prompt_limit(config, model)
        prompts = FileOrder(
            config.data,
            tokenizer=tokenizer,
            seed=config.seed,
            max_prompt_tokens=limit,
            vocab_size=model["vocab_size"],
        )
        prompt_ids = ids_of(islice(prompts, config.limit), config.data.path)
        job = Job.of(config, model_dir, limit)
        return cls(config, model_dir, model, tokenizer, prompts, prompt_ids, job)


def ids_of(prompts: Iterable[Prompt | Skipped], name: str) -> frozenset[str]:
    """The prompt ids of all records.

    Raises:
        DataError: none of them gives a prompt.
    """
    ids, first_reason, num_usable = list[str](), "", 0
    for prompt in prompts:
        ids.append(prompt.id)
        if isinstance(prompt, Skipped):
            first_reason = first_reason or f"{prompt.id}: {prompt.reason}"
        else:
            num_usable += 1
    if num_usable == 0:
        reason = first_reason or f"{name} is empty; give a source with records"
        raise DataError(f"no usable record ({len(ids)} skipped): {reason}")
    return frozenset(ids)


@dataclass
class Standalone:
    """One start of a job."""

    inputs: Inputs
    output: Output
    printer: Printer
    tally: Tally = field(init=False)
    _key_file: Path = field(init=False)
    """Of the engine that is started for this work alone."""

    def __post_init__(self) -> None:
        # the output may hold more, of a start with a higher limit
        ids = self.inputs.prompt_ids
        counts = self.output.endings.count(ids)
        self.tally = Tally(
            len(ids),
            self.printer.seconds,
            done=len(self.output.done & ids),
            skipped=counts[Outcome.SKIPPED],
            failed=counts[Outcome.FAILED],
        )

    def describe(self) -> list[str]:
        """What will be done, for a person."""
        config, tree = self.inputs.config, self.inputs.config.tree
        left = self.tally.total - self.tally.ended
        rows = [
            ("data", f"{config.data.path}, {self.tally.total} prompts, {left} left"),
            ("model", f"{config.model.path} at {self.inputs.model_dir}"),
            (
                "tree",
                f"{tree.width} leaves, segments of {tree.segment_tokens} x depth {tree.max_depth}, "
                f"responses up to {response_limit(config)} tokens, scored by {config.reward.scorer}",
            ),
            ("out", f"{self.output.out}, {config.out_form}"),
        ]
        return [f"  {name:<10} {text}" for name, text in rows]

    def is_unfinished(self) -> bool:
        """Whether a prompt has not ended yet."""
        return self.tally.ended < self.tally.total

    def files(self) -> str:
        """Where the results are."""
        failed = self.output.endings
        note = f"; without a tree: {failed.file}" if failed.by_id else ""
        return f"{self.output.newest()}{note}"

    async def run(self) -> None:
        """Return once every prompt has ended.

        Raises:
            StoppedError: a signal came.
            EngineError: the engine is gone for good.
            WeightsError: its weights are not those it had.
            TreepoError: too many prompts in a row failed.
            ConfigError: the engine does not fit, or its weights are not those of the trees that are there.
            DataError: the output cannot be written.
        """
        task, stopping = asyncio.current_task(), list[int]()
        assert task is not None, "runs in a task"

        def on_signal(number: int) -> None:
            if stopping:
                os._exit(EXIT_STOPPED)
            stopping.append(number)
            name = signal.Signals(number).name
            self.printer.line(f"{name}: stopping; once more to stop at once")
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        try:
            with TemporaryDirectory(prefix="treepo-") as private:
                self._key_file = Path(private) / ENGINE_KEY_FILE
                await self._work()
        except asyncio.CancelledError:
            if not stopping:
                raise
            raise StoppedError from None

    async def _work(self) -> None:
        config = self.inputs.config
        async with (
            open_scoring(
                config.reward,
                decode=self.inputs.tokenizer.decode,
                max_response_tokens=response_limit(config),
            ) as scoring,
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers=bearer(self._engine_key())
            ) as session,
            self._engine(session) as engine,
        ):
            await self._generate(engine, session, scoring)

    @asynccontextmanager
    async def _engine(self, session: aiohttp.ClientSession) -> AsyncIterator[FixedEngine]:
        """The engine, ready, with the weights that the job has."""
        engine = self._make_engine(session)
        try:
            self.printer.line(f"engine: {self._engine_words()}")
            weights = await engine.start()
            self.printer.line("engine: ready")
            self.output.settle_weights(weights)
            yield engine
        finally:
            await engine.stop()

    def _engine_key(self) -> str | None:
        """What the engine wants to see of its clients; that of somebody else's may want nothing."""
        settings = self.inputs.config.engine
        if settings.url is None:
            return ensure_key(self._key_file)
        return None if settings.api_key_file is None else read_key(Path(settings.api_key_file))

    def _make_engine(self, session: aiohttp.ClientSession) -> FixedEngine:
        config, model = self.inputs.config, self.inputs.model
        settings = config.engine
        remotes = [
            RemoteEngine(
                url,
                session,
                vocab_size=model["vocab_size"],
                context_length=context_length(config, model),
                away_timeout_s=settings.start_timeout_s,
            )
            for url in engine_urls(settings)
        ]
        if remotes:
            return remotes[0] if len(remotes) == 1 else RemoteFleet(remotes)
        log_file = beside(self.output.out, "sglang.log")
        (port,) = free_ports(1)
        options = options_of(config, model, port=port, log_file=log_file, key_file=self._key_file)
        server = Server(options, session)
        return KeptEngine(
            server, self.inputs.model_dir, settings.start_timeout_s, settings.max_restarts
        )

    def _engine_words(self) -> str:
        url = self.inputs.config.engine.url
        log_file = beside(self.output.out, "sglang.log")
        return f"starting SGLang, log in {log_file}" if url is None else f"using {url}"

    def _sampler(self, engine: FixedEngine, session: aiohttp.ClientSession) -> Engine:
        """What trees are grown on: a client, or a pool of them."""
        engines = engine.members if isinstance(engine, RemoteFleet) else [engine]
        # another one for each start: a server of somebody else may have had other weights before
        namespace = secrets.token_hex(4)
        members = [
            Member(
                one.url,
                EngineClient(
                    one.url,
                    one.gate,
                    session,
                    namespace=namespace,
                    vocab_size=self.inputs.model["vocab_size"],
                    request_timeout_s=self.inputs.config.engine.request_timeout_s,
                    update_mode=None,
                ),
                one.gate,
            )
            for one in engines
        ]
        if len(members) == 1:
            return members[0].client
        return EnginePool(members, timeout_s=self.inputs.config.engine.start_timeout_s)

    async def _generate(
        self, engine: FixedEngine, session: aiohttp.ClientSession, scoring: Scoring
    ) -> None:
        config = self.inputs.config
        sampler = self._sampler(engine, session)
        settings = expand_settings(
            config.tree,
            self.inputs.tokenizer,
            prune=config.prune,
            stream_tokens=config.engine.stream_tokens,
        )
        generation = Generation(
            self.inputs.prompts,
            config.limit,
            Grower(NAME, sampler, settings, scoring, config.seed, config.reward.shuffle),
            engine,
            self.output,
            self.tally,
            config.max_failed,
        )
        self.tally.begin()
        try:
            async with asyncio.TaskGroup() as tasks:
                beside_it = [
                    tasks.create_task(work, name=name)
                    for work, name in (
                        (engine.watch(), "engine"),
                        (self._sync(), "sync"),
                        (self._tick(engine), "progress"),
                    )
                ]
                await generation.run(config.concurrent_trees)
                for task in beside_it:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            self.tally.end()
            self.tally.restarts = engine.num_restarts
            self.tally.failures = scoring.failures

    async def _sync(self) -> None:
        """Keep what may be lost to a power cut small."""
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self.output.sync)

    async def _tick(self, engine: FixedEngine) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.tally.restarts = engine.num_restarts
            self.printer.progress(self.tally.line())


def _first(error: BaseException) -> BaseException:
    """The first failure inside of any groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
