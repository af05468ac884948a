"""Step records: what the roles told the driver, put together under the names that metrics have everywhere.

The one place that spells metric names. A record is flat, one a step, and goes to every sink.
"""

import time
from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from treepo_async.metrics.lengths import LengthSums

Event = Mapping[str, Any]

STEP_NAMES = {
    "reward/mean": "reward_mean",
    "reward/errors": "reward_errors",
    "accuracy/train": "accuracy_mean",
    "staleness/mean": "staleness_mean",
    "staleness/max": "staleness_max",
    "staleness/bound": "max_staleness",
    "tokens/unique": "num_unique_tokens",
    "tokens/offline": "offline_share",
    "tokens/response_mean": "response_tokens_mean",
    "learner/lineage": "lineage",
    "learner/loss": "loss",
    "learner/policy_loss": "policy_loss",
    "learner/grad_norm": "grad_norm",
    "learner/lr": "learning_rate",
    "learner/entropy": "entropy",
    "learner/kl_behavior": "kl_behavior",
    "learner/kl_reference": "kl_reference",
    "learner/correction_weight": "correction_weight_mean",
    "learner/correction_capped": "correction_capped_share",
    "learner/clipped": "clipped_share",
    "learner/masked": "masked_share",
    "learner/ess": "ess",
    "learner/microbatches": "num_microbatches",
    "learner/skipped": "num_skipped",
    "gap/sampled_max": "logprob_gap_max",
    "gap/sampled_mean": "logprob_gap_mean",
}
"""Metric name: field of the learner's `step` event."""

STEP_TABLES = {"lag": "by_lag", "level": "by_level"}
"""First part of metric names: field of the learner's `step` event with a row of numbers for each lag or level there was."""

WEIGHTS_NAMES = {
    "gap/probe_max": "gap",
    "weights/pause_s": "pause_s",
    "weights/drain_s": "drain_s",
    "weights/load_s": "load_s",
    "weights/probe_s": "probe_s",
    "weights/visible_s": "publish_to_visible_s",
}
"""Metric name: field of the engine's `weights` event."""

EVAL_NAMES = {
    "eval/sampled_accuracy": "sampled_accuracy",
    "eval/pass_at_k": "pass_at_k",
    "eval/greedy_accuracy": "greedy_accuracy",
    "eval/seconds": "seconds",
}
"""Metric name: field of the actor's `eval` event. `pass_at_k` is left out where one sample was drawn."""

TREE_SUMS = (
    "decoded_tokens",
    "delivered_tokens",
    "wasted_tokens",
    "cached_tokens",
    "prefix_tokens",
    "num_requests",
    "overhead_s",
    "num_fallbacks",
    "num_leaves",
    "num_pruned",
    "saved_tokens",
    "weight_sum",
    "weighted_tokens",
    "accuracy_sum",
    "num_scored",
    "num_children",
    "num_spilled",
    "num_migrated",
    "moved_tokens",
    "refilled_tokens",
)

STALE = "stale"
"""Outcome of a tree that was too old for its batch when it arrived."""


class Recorder:
    """Collects events between two steps."""

    def __init__(self) -> None:
        self._trees: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()
        self._routed: Counter[str] = Counter()
        """Decoded tokens by engine, where actors use several."""
        self._grow_s: list[float] = []

    def tree(self, event: Event) -> None:
        """Count a tree that arrived in replay, trained or not."""
        for name in TREE_SUMS:
            self._trees[name] += event[name]
        if event["outcome"] == STALE:
            self._trees["stale_tokens"] += event["decoded_tokens"]
        self._outcomes[event["outcome"]] += 1
        self._grow_s.append(event["grow_s"])

    def engine(self, event: Event) -> None:
        """Count samples of the engine's load."""
        self._samples["all"] += event["num_samples"]
        self._samples["idle"] += event["num_idle"]

    def route(self, event: Event) -> None:
        """Count what an engine did for one actor."""
        self._routed[event["engine"]] += event["decoded_tokens"]

    def step(self, event: Event, weights: Event | None) -> dict[str, Any]:
        """The record of a step, and start counting for the next one.

        Args:
            event: the learner's `step`.
            weights: the engine's `weights` for the version that the step published, if it came.
        """
        record = {"step": event["policy_step"], "time": time.time()}
        record |= {name: event[field] for name, field in STEP_NAMES.items()}
        for axis, field in STEP_TABLES.items():
            record |= _flat(axis, event.get(field, {}))
        record |= {name: (weights or {}).get(field) for name, field in WEIGHTS_NAMES.items()}
        record |= self._sampling()
        seconds = event["seconds"]
        record |= {f"time/{name}_s": value for name, value in seconds.items()}
        record["idle/learner"] = seconds.get("wait_batch", 0.0) / seconds["wall"]
        record["idle/engine"] = _share(self._samples["idle"], self._samples["all"])
        record |= {f"leases/{name}": value for name, value in event["replay"].items()}
        for counter in (self._trees, self._outcomes, self._samples, self._routed):
            counter.clear()
        self._grow_s.clear()
        return record

    def _sampling(self) -> dict[str, Any]:
        trees = self._trees
        lengths = LengthSums(
            trees["delivered_tokens"],
            trees["num_leaves"],
            trees["weighted_tokens"],
            trees["weight_sum"],
        )
        return {
            "tokens/decoded": trees["decoded_tokens"],
            "tokens/delivered": trees["delivered_tokens"],
            "tokens/wasted": trees["wasted_tokens"],
            "tokens/stale": trees["stale_tokens"],
            "tokens/decoded_per_delivered": _share(
                trees["decoded_tokens"], trees["delivered_tokens"]
            ),
            "cache/hit_share": _share(trees["cached_tokens"], trees["prefix_tokens"]),
            "engine/http_s": _share(trees["overhead_s"], trees["num_requests"]),
            "accuracy/sampled": _share(trees["accuracy_sum"], trees["num_scored"]),
            "tokens/saved": trees["saved_tokens"],
            "length/delivered": lengths.delivered,
            "length/unbiased": lengths.unbiased,
            "tree/grow_mean_s": fmean(self._grow_s) if self._grow_s else None,
            "tree/grow_max_s": max(self._grow_s, default=None),
            **self._routing(),
            "trees/fallback_runs": trees["num_fallbacks"],
            "trees/pruned_paths": trees["num_pruned"],
            **{f"trees/{outcome}": count for outcome, count in self._outcomes.items()},
        }

    def _routing(self) -> dict[str, Any]:
        trees, moved = self._trees, self._trees["num_spilled"] + self._trees["num_migrated"]
        decoded = self._routed.values()
        return {
            "route/home_share": _share(trees["num_children"] - moved, trees["num_children"]),
            "route/spilled": trees["num_spilled"],
            "route/migrated": trees["num_migrated"],
            "route/moved_tokens": trees["moved_tokens"],
            "route/refilled_tokens": trees["refilled_tokens"],
            "route/load_max_mean": _share(
                max(decoded, default=0), sum(decoded) / max(1, len(decoded))
            ),
        }


def eval_record(event: Event) -> dict[str, Any]:
    """The record of an evaluation, from the actor's `eval`."""
    record = {"step": event["step"], "time": time.time()}
    return record | {name: event[field] for name, field in EVAL_NAMES.items() if field in event}


def _flat(axis: str, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """E.g. `lag/3/ess` from row 3, column ess."""
    return {
        f"{axis}/{row}/{column}": value
        for row, values in table.items()
        for column, value in values.items()
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
