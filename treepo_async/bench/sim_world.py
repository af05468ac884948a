"""A run in simulated time: actors that grow trees, engines, the replay queue, a learner, and weights between them.

    slot of an actor   lease -> grow (requests, round by round or as soon as their parents end) -> put -> lease ...
    learner            batch -> train -> publish -> batch ...
    publication        replay admits more leases; engine after engine is offered the weights, then the newest that came
                       meanwhile

`sim_engine` and `sim_replay` hold the rules of their parts. What a run depends on is in `sim_settings`; there are no
failures, evaluations and checkpoints here. Invariants, asserted as it runs: no token is trained that is more than
`max_staleness` publications old, and every lease ends once.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from treepo_async.bench.sim_clock import Clock, Stopwatch
from treepo_async.bench.sim_engine import Pieces, SimEngine, SimRequest
from treepo_async.bench.sim_replay import SimQueue, SimReplay
from treepo_async.bench.sim_settings import SimSettings
from treepo_async.bench.sim_trees import Plan, draw_plan
from treepo_async.replay.rules import QueueRules


@dataclass(frozen=True, slots=True)
class GrownTree:
    """A tree as the learner gets it."""

    tokens: int
    """Each counted once."""
    leaf_tokens: int
    """Each counted once for every leaf below it."""
    pieces: Pieces
    """Tokens by version."""


@dataclass(frozen=True, slots=True)
class SimStep:
    """A step of the learner."""

    step: int
    """From 1."""
    end_s: float
    wait_batch_s: float
    train_s: float
    publish_s: float
    trees: int
    tokens: int
    leaf_tokens: int
    decoded_tokens: int
    """Of the trees that were delivered since the step before."""
    discarded_tokens: int
    """Of these, of trees that were dropped."""
    lags: dict[int, int]
    """Tokens by publications between sampling and training."""


@dataclass
class SimResult:
    """What became of a run."""

    steps: list[SimStep] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """By role (all slots of all actors, all engines) and activity."""
    pauses: list[float] = field(default_factory=list)
    """Of all engines, for new weights."""
    decoded_tokens: int = 0
    leased: int = 0
    ended: int = 0
    """Leases whose trees were delivered."""
    dropped: int = 0
    trained: int = 0
    """Trees."""

    def mean_step_s(self, *, warm_up: int = 0) -> float:
        """From the end of the warm-up on."""
        begin = self.steps[warm_up - 1].end_s if warm_up else 0.0
        return (self.steps[-1].end_s - begin) / (len(self.steps) - warm_up)

    def tokens_per_s(self, *, warm_up: int = 0) -> float:
        """Trained tokens of all leaves, likewise."""
        rest = self.steps[warm_up:]
        return sum(s.leaf_tokens for s in rest) / (self.mean_step_s(warm_up=warm_up) * len(rest))

    def share(self, role: str, *activities: str) -> float:
        """Of the time of a role."""
        seconds = self.seconds[role]
        whole = sum(seconds.values())
        return sum(seconds.get(name, 0.0) for name in activities) / whole if whole else 0.0


class World:
    """One run; `run` once."""

    def __init__(self, settings: SimSettings) -> None:
        settings.check()
        self._settings = settings
        self.clock = Clock()
        rules = QueueRules(
            prompts_per_batch=settings.prompts_per_batch,
            max_staleness=settings.max_staleness,
            num_batches=settings.num_steps,
            lease_timeout_s=60.0,
            max_attempts=1,
            drop_degenerate=True,
            max_refills=settings.max_refills,
        )
        self.queue: SimQueue[GrownTree] = SimQueue(rules)
        self.replay = SimReplay(self.clock, settings.replay, self.queue)
        self.engines = [
            SimEngine(self.clock, settings.engine, settings.update_mode)
            for _ in range(settings.engines)
        ]
        self.result = SimResult()
        self._decoded = self._discarded = 0
        """Tokens of the trees delivered since the last step."""
        self._pending = self._sending = 0
        """Newest publication, and the one that is on its way to engines."""
        self._is_sending = False
        self._learner = _Learner(self)
        self._slots = [
            _Slot(self, self.engines[actor % settings.engines])
            for actor in range(settings.actors)
            for _ in range(settings.trees_per_actor)
        ]

    @property
    def settings(self) -> SimSettings:
        """Of the run."""
        return self._settings

    def run(self, until: int | None = None) -> SimResult:
        """Train all steps, or the first so many of them."""
        wanted = until or self._settings.num_steps
        for slot in self._slots:
            slot.begin()
        self._learner.ask()
        self.clock.run(lambda: len(self.result.steps) == wanted)
        return self._closed()

    def tree_rng(self, number: int) -> random.Random:
        """The same tree for the same lease, whoever grows it and when."""
        return random.Random(f"{self._settings.seed}/{number}")

    def publish(self, step: int) -> None:
        """Weights are out."""
        self.replay.publish(step)
        self._pending = step
        if not self._is_sending:
            self._is_sending = True
            self.clock.after(self._settings.weights.send_s, lambda: self._send(0))

    def delivered(self, tree: GrownTree, *, is_kept: bool) -> None:
        """A tree is on its way to replay."""
        self._decoded += tree.tokens
        self._discarded += 0 if is_kept else tree.tokens

    def trained(
        self, batch: Sequence[GrownTree], wait_s: float, train_s: float, publish_s: float
    ) -> None:
        """A step is over, and published."""
        step = len(self.result.steps)
        lags: Counter[int] = Counter()
        for tree in batch:
            lags.update({step - version: tokens for version, tokens in tree.pieces.items()})
        assert 0 <= min(lags) <= max(lags) <= self._settings.max_staleness, "staleness bound"
        done = SimStep(
            step=step + 1,
            end_s=self.clock.now,
            wait_batch_s=wait_s,
            train_s=train_s,
            publish_s=publish_s,
            trees=len(batch),
            tokens=sum(tree.tokens for tree in batch),
            leaf_tokens=sum(tree.leaf_tokens for tree in batch),
            decoded_tokens=self._decoded,
            discarded_tokens=self._discarded,
            lags=dict(lags),
        )
        self._decoded = self._discarded = 0
        self.result.steps.append(done)
        self.result.trained += len(batch)
        self.publish(step + 1)

    def _send(self, place: int) -> None:
        """To the engine of that number and those after it, then the newest that came meanwhile."""
        if place == 0:
            self._sending = self._pending
        speed = self._settings.weights
        if place < len(self.engines):
            self.engines[place].offer(self._sending, speed.load_s)
            self.clock.after(speed.each_s, lambda: self._send(place + 1))
        elif self._pending > self._sending:
            self.clock.after(speed.send_s, lambda: self._send(0))
        else:
            self._is_sending = False

    def _closed(self) -> SimResult:
        result, end = self.result, self.clock.now
        watches = {
            "learner": [self._learner.watch],
            "engine": [engine.watch for engine in self.engines],
            "actor": [slot.watch for slot in self._slots],
        }
        for role, kept in watches.items():
            result.seconds[role] = _summed(kept)
        busy = min(end, self.replay.busy_s)
        result.seconds["replay"] = {"compute": busy, "idle": end - busy}
        result.pauses = [pause for engine in self.engines for pause in engine.pauses]
        result.decoded_tokens = sum(engine.decoded for engine in self.engines)
        result.leased, result.dropped = self.queue.num_leased, self.queue.num_dropped
        return result


class _Slot:
    """One of the trees that an actor grows at once."""

    def __init__(self, world: World, engine: SimEngine) -> None:
        self._world, self._engine = world, engine
        self.watch = Stopwatch(world.clock)

    def begin(self) -> None:
        """Ask for a lease."""
        self.watch.switch("wait_queue")
        self._world.replay.lease(self._grow)

    def _grow(self, number: int, least_version: int) -> None:
        self.watch.switch("compute")
        settings = self._world.settings
        rng = self._world.tree_rng(number)
        plan = draw_plan(settings.shape, settings.lengths, rng)
        has_spread = rng.random() >= settings.degenerate

        def put(pieces: Pieces) -> None:
            tree = GrownTree(plan.tokens, plan.leaf_tokens, pieces)
            self._put(number, tree, has_spread=has_spread)

        growing = _Growing(self._engine, plan, least_version, settings.shape.prompt_tokens, put)
        self.watch.seconds.setdefault("wait_weights", 0.0)
        self._growing = growing
        growing.start(is_eager=settings.shape.growth == "eager")

    def _put(self, number: int, tree: GrownTree, *, has_spread: bool) -> None:
        shut_s = self._growing.shut_s
        self.watch.switch("sync")
        self.watch.seconds["compute"] = self.watch.seconds.get("compute", 0.0) - shut_s
        self.watch.seconds["wait_weights"] += shut_s
        world = self._world

        def acknowledged() -> None:
            world.result.ended += 1
            self.begin()

        def deliver() -> None:
            world.replay.put(number, tree, has_spread=has_spread, acknowledged=acknowledged)
            world.delivered(tree, is_kept=has_spread)

        world.clock.after(world.settings.score_s, deliver)


class _Growing:
    """A tree in an engine."""

    def __init__(
        self,
        engine: SimEngine,
        plan: Plan,
        least_version: int,
        prompt_tokens: int,
        grown: Callable[[Pieces], None],
    ) -> None:
        self._engine, self._plan, self._grown = engine, plan, grown
        self._least, self._prompt = least_version, prompt_tokens
        self._versions: dict[int, int] = {}
        self._pieces: Counter[int] = Counter()
        self._num_out = 0
        self._num_done = 0
        self.shut_s = 0.0
        """In which it was shut out, as a share of its requests."""

    def start(self, *, is_eager: bool) -> None:
        """Ask for what can be asked for."""
        self._children: dict[int, list[int]] = {}
        for place, request in enumerate(self._plan.requests):
            key = request.parent if is_eager else request.round
            self._children.setdefault(key, []).append(place)
        self._is_eager = is_eager
        self._ask(self._children[-1 if is_eager else 0])

    def _ask(self, places: Sequence[int]) -> None:
        self._num_out += len(places)
        for place in places:
            self._submit(place, self._num_out)

    def _submit(self, place: int, beside: int) -> None:
        request = self._plan.requests[place]

        def done(pieces: Pieces) -> None:
            self.shut_s += asked.shut_s / beside
            self._done(place, pieces)

        cached_by = self._versions.get(request.parent, -1)
        context = self._prompt + request.begin
        asked = SimRequest(request.tokens, context, cached_by, self._least, done)
        self._engine.submit(asked)

    def _done(self, place: int, pieces: Pieces) -> None:
        self._pieces.update(pieces)
        self._versions[place] = max(pieces)
        self._num_out -= 1
        self._num_done += 1
        if self._is_eager:
            self._ask(self._children.get(place, ()))
        elif self._num_out == 0 and self._num_done < len(self._plan.requests):
            self._ask(self._children[self._plan.requests[self._num_done].round])
        if self._num_done == len(self._plan.requests):
            self._grown(dict(self._pieces))


class _Learner:
    """Trains."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.watch = Stopwatch(world.clock)
        self._asked_at = 0.0

    def ask(self) -> None:
        """For the next batch."""
        self._asked_at = self._world.clock.now
        self.watch.switch("wait_data")
        self._world.replay.next_batch(self._train)

    def _train(self, batch: list[GrownTree]) -> None:
        clock, speed = self._world.clock, self._world.settings.learner
        wait_s = clock.now - self._asked_at
        train_s = speed.batch_s + speed.token_s * sum(tree.tokens for tree in batch)
        self.watch.switch("compute")
        clock.after(train_s, lambda: self._publish(batch, wait_s, train_s))

    def _publish(self, batch: list[GrownTree], wait_s: float, train_s: float) -> None:
        self.watch.switch("sync")
        publish_s = self._world.settings.weights.publish_s
        self._world.clock.after(publish_s, lambda: self._end(batch, wait_s, train_s, publish_s))

    def _end(self, batch: list[GrownTree], wait_s: float, train_s: float, publish_s: float) -> None:
        self._world.trained(batch, wait_s, train_s, publish_s)
        self.ask()


def _summed(watches: Iterable[Stopwatch]) -> dict[str, float]:
    whole: dict[str, float] = {}
    for watch in watches:
        watch.switch(watch.activity)
        for activity, seconds in watch.seconds.items():
            whole[activity] = whole.get(activity, 0.0) + seconds
    return whole
