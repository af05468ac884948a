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

from treepo_async.bench.sim_clock import Clock, Stopwatch
from treepo_async.bench.sim_engine import Pieces, SimEngine, SimRequest
from treepo_async.bench.sim_replay import SimQueue, SimReplay
from treepo_async.bench.sim_result import GrownTree, SimResult, SimStep
from treepo_async.bench.sim_settings import SimSettings
from treepo_async.bench.sim_trees import Plan, draw_plan, resized
from treepo_async.replay.rules import QueueRules


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
            drop_degenerate=settings.drop_degenerate,
            max_refills=settings.max_refills,
        )
        self.queue: SimQueue[GrownTree] = SimQueue(rules)
        self.replay = SimReplay(self.clock, settings.replay, self.queue)
        self.engines = [
            SimEngine(self.clock, settings.engine, settings.update_mode)
            for _ in range(settings.engines)
        ]
        self.result = SimResult()
        self._warm_up = 0
        self._arrived: list[tuple[GrownTree, bool]] = []
        """Trees delivered since the last step, and whether they were kept."""
        self._pending = self._sending = 0
        """Newest publication, and the one that is on its way to engines."""
        self._is_sending = False
        self._accounts_since = 0.0
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

    def run(self, until: int | None = None, *, warm_up: int = 0) -> SimResult:
        """Train all steps, or the first so many of them. Accounts of time begin behind the warm-up."""
        wanted = until or self._settings.num_steps
        self._warm_up = warm_up
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
        """Replay has a tree."""
        self.result.ended += 1
        self._arrived.append((tree, is_kept))

    def trained(
        self, batch: Sequence[GrownTree], wait_s: float, train_s: float, publish_s: float
    ) -> None:
        """A step is over, and published."""
        step = len(self.result.steps)
        lags: Counter[int] = Counter()
        for tree in batch:
            lags.update({step - version: tokens for version, tokens in tree.pieces.items()})
        assert 0 <= min(lags) <= max(lags) <= self._settings.max_staleness, "staleness bound"
        lost = [tree.tokens for tree, is_kept in self._arrived if not is_kept]
        done = SimStep(
            step=step + 1,
            end_s=self.clock.now,
            wait_batch_s=wait_s,
            train_s=train_s,
            publish_s=publish_s,
            trees=len(batch),
            tokens=sum(tree.tokens for tree in batch),
            leaf_tokens=sum(tree.leaf_tokens for tree in batch),
            decoded_tokens=sum(tree.tokens for tree, _ in self._arrived),
            discarded_tokens=sum(lost),
            delivered=len(self._arrived),
            dropped=len(lost),
            lags=dict(lags),
        )
        self._arrived.clear()
        self.result.steps.append(done)
        self.result.trained += len(batch)
        if step + 1 == self._warm_up:
            self._begin_accounts()
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

    def _watches(self) -> dict[str, list[Stopwatch]]:
        for slot in self._slots:
            slot.settle()
        return {
            "learner": [self._learner.watch],
            "engine": [engine.watch for engine in self.engines],
            "actor": [slot.watch for slot in self._slots],
        }

    def _begin_accounts(self) -> None:
        for watches in self._watches().values():
            for watch in watches:
                watch.restart()
        self._accounts_since = self.clock.now
        self.replay.busy_s = 0.0

    def _closed(self) -> SimResult:
        result = self.result
        for role, kept in self._watches().items():
            result.seconds[role] = _summed(kept)
        whole = self.clock.now - self._accounts_since
        busy = min(whole, self.replay.busy_s)
        result.seconds["replay"] = {"compute": busy, "idle": whole - busy}
        result.pauses = [pause for engine in self.engines for pause in engine.pauses]
        result.decoded_tokens = sum(engine.decoded for engine in self.engines)
        result.leased, result.dropped = self.queue.num_leased, self.queue.num_dropped
        return result


class _Slot:
    """One of the trees that an actor grows at once; its accounts are those of `metrics.categories.ACTOR`."""

    def __init__(self, world: World, engine: SimEngine) -> None:
        self._world, self._engine = world, engine
        self._growing: _Growing | None = None
        self.watch = Stopwatch(world.clock)

    def begin(self) -> None:
        """Ask for a lease."""
        self.watch.switch("wait_data")
        self._world.replay.lease(self._grow)

    def settle(self) -> None:
        """Book the time so far in which the tree was shut out."""
        self.watch.switch(self.watch.activity)
        if self._growing is not None:
            self.watch.move(
                "compute", "wait_weights", self._growing.take_shut(self._world.clock.now)
            )

    def _grow(self, number: int, least_version: int) -> None:
        self.watch.switch("compute")
        settings = self._world.settings
        rng = self._world.tree_rng(number)
        plan = draw_plan(settings.shape, settings.lengths, rng)
        has_spread = rng.random() >= settings.degenerate_at(self._world.queue.published)
        if not has_spread and settings.dropped_size != 1.0:
            plan = resized(plan, settings.dropped_size, rng)

        def put(pieces: Pieces) -> None:
            tree = GrownTree(plan.tokens, plan.leaf_tokens, pieces)
            self._put(number, tree, has_spread=has_spread)

        self._growing = _Growing(
            self._engine, plan, least_version, settings.shape.prompt_tokens, put
        )
        self._growing.start(is_eager=settings.shape.growth == "eager")

    def _put(self, number: int, tree: GrownTree, *, has_spread: bool) -> None:
        self.settle()
        self._growing = None
        world = self._world

        def acknowledged(is_kept: bool) -> None:
            world.delivered(tree, is_kept=is_kept)
            self.begin()

        def deliver() -> None:
            self.watch.switch("wait_queue")
            world.replay.put(number, tree, has_spread=has_spread, acknowledged=acknowledged)

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
        self._shut_s = 0.0
        """Of requests that ended, see `take_shut`."""
        self._out: dict[int, tuple[SimRequest, int]] = {}
        """By place: requests in the engine, and how many went there with each."""

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
            self._shut_s += asked.shut_s / beside
            del self._out[place]
            self._done(place, pieces)

        cached_by = self._versions.get(request.parent, -1)
        context = self._prompt + request.begin
        asked = SimRequest(request.tokens, context, cached_by, self._least, done)
        self._out[place] = asked, beside
        self._engine.submit(asked)

    def take_shut(self, now: float) -> float:
        """Seconds since the last call in which it was shut out, as a share of its requests."""
        shut_s, self._shut_s = self._shut_s, 0.0
        for request, beside in self._out.values():
            shut_s += request.take_shut(now) / beside
        return shut_s

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
