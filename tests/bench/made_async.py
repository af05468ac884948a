"""Made rows of `bench.py async`."""

from math import nan

from treepo_async.bench.async_rows import CellData, EvalRow, LedgerRow, StepRow


def step_row(step, seconds, **more):
    """A step of 100 trajectory tokens."""
    values = {
        "backend": "made",
        "arm": "sync",
        "seed": 0,
        "trained_tokens": 100,
        "trained_tokens_unique": 60,
        "decoded_tokens": 80,
        "discarded_tokens": 20,
        "staleness_mean": 0.5,
        "staleness_max": 1,
        "lag_tokens": "0=0.5 1=0.5",
        "lag_ess": "0=1 1=0.9",
        "wait_batch_s": 1.0,
        "train_s": 0.75,
        "publish_s": 0.25,
        "reward": 0.0,
        "pause_s": 0.1,
    }
    return StepRow(step=step, seconds=seconds, **{**values, **more})


def cell(arm="sync", seed=0, step_s=2.0, rewards=(0.0,) * 6, **more):
    """A cell whose steps take equally long."""
    rows = [
        step_row(n, n * step_s, arm=arm, seed=seed, reward=reward, **more)
        for n, reward in enumerate(rewards, start=1)
    ]
    ledger = [
        LedgerRow("made", arm, seed, "learner", "compute", 6.0),
        LedgerRow("made", arm, seed, "learner", "wait_data", 2.0),
        LedgerRow("made", arm, seed, "actor", "compute", 9.0),
        LedgerRow("made", arm, seed, "actor", "wait_weights", 1.0),
    ]
    evals = [EvalRow("made", arm, seed, 6, 12.5, 0.75, nan)]
    return CellData(rows, ledger, evals)
