"""Folders of runs that were never made: what the readers of runs need of them."""

import json

import yaml

TREE = {
    "segment_tokens": 10,
    "max_depth": 4,
    "width": 8,
    "branching_factor": 2,
    "first_fork_min": 2,
    "growth": "barrier",
}


def step(number, **more):
    """A record of a step; its responses all have 20 tokens."""
    record = {
        "step": number,
        "time": 100.0 + number,
        "reward/mean": number / 10,
        "staleness/mean": 0.5,
        "staleness/max": 1,
        "tokens/unique": 100,
        "tokens/decoded": 150,
        "lag/0/tokens": 80,
        "lag/0/ess": 1.0,
        "lag/1/tokens": 80,
        "lag/1/ess": 0.5,
        "level/0/tokens": 80,
        "level/1/tokens": 80,
        "time/wall_s": 2.0,
        "time/train_s": 0.5,
        "time/publish_s": 0.1,
        "weights/load_s": 0.02,
        "weights/probe_s": 0.03,
        "trees/degenerate": 1,
        "trees/accepted": 3,
    }
    return record | more


def evaluation(number, accuracy):
    return {
        "step": number,
        "time": 100.5 + number,
        "eval/sampled_accuracy": accuracy,
        "eval/greedy_accuracy": 1.0,
    }


def write_run(
    folder, records, *, steps=4, staleness=1, correction="none", seed=0, loss=None, **more
):
    """A folder with config and metrics; `loss`: the section that has the correction."""
    learner = {"loss": {"correction": correction}} if loss else {"correction": correction}
    config = {
        "steps": steps,
        "seed": seed,
        "actors": 2,
        "engines": 1,
        "actor": {"concurrent_trees": 4},
        "engine": {"update_mode": "drain", "max_running_requests": 16},
        "replay": {
            "prompts_per_batch": 3,
            "max_staleness": staleness,
            "drop_degenerate": True,
            "max_refills": 64,
        },
        "learner": learner,
        "tree": TREE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder
