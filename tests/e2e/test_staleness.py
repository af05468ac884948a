"""How far sampling may run ahead of the learner, with each way to change weights under it."""

import json

import pytest

STEPS, BATCH = 6, 4
WORDS = (f"steps={STEPS}", "eval.every=0", "tree.width=8", f"replay.prompts_per_batch={BATCH}")
RUN_S = 200

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 30)]


@pytest.mark.parametrize(
    ("max_staleness", "mode", "num_engines"),
    [(0, "drain", 2), (1, "in_place", 1), (4, "drain", 1), (4, "retract", 1)],
)
def test_no_trained_segment_is_older_than_the_bound(launch, max_staleness, mode, num_engines):
    run = launch(
        *WORDS,
        f"replay.max_staleness={max_staleness}",
        f"engine.update_mode={mode}",
        f"engines={num_engines}",
    )
    assert run.wait(timeout_s=RUN_S) == 0, str(run)
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    stalest = max(step["staleness/max"] for step in steps)
    assert stalest <= max_staleness
    # at the start as many batches are let out as the bound allows, all under the first weights
    assert stalest >= min(max_staleness, 2)
    assert not any("ALARM" in line for line in run.lines)
    check_engines(run, num_engines)


def check_engines(run, number):
    """Each takes a version once, the first of them the last one too."""
    applied = [(event["role"], event["version"]) for event in run.events("weights")]
    assert len(applied) == len(set(applied))
    assert {engine for engine, _ in applied} == {f"engine-{i}" for i in range(number)}
    assert ("engine-0", f"0.{STEPS}") in applied
