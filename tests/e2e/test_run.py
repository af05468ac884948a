"""One whole run with the real SGLang and the real Megatron-Core, looked at from every side."""

import json
from collections import Counter

import numpy as np
import pytest

from tests.metrics.trace_rules import faults_of
from tests.oracle import sequence_logprobs
from treepo_async.cluster.verify import verify_run
from treepo_async.config.command_line import load, parse
from treepo_async.metrics.categories import Category
from treepo_async.metrics.chrome_trace import chrome_trace
from treepo_async.metrics.ledger_sums import totals
from treepo_async.metrics.trace_log import read_trace
from treepo_async.weights.manifest import Manifest

STEPS, BATCH, MAX_STALENESS = 3, 16, 1
OUTCOMES = ("accepted", "degenerate")
WORDS = (f"steps={STEPS}", "eval.every=3", "actors=2")
RUN_S = 240

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 30)]


@pytest.fixture(scope="module")
def run(launch):
    started = launch(*WORDS)
    code = started.wait(timeout_s=RUN_S)
    assert code == 0, str(started)
    return started


@pytest.fixture(scope="module")
def records(run):
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def steps(records):
    return [record for record in records if "reward/mean" in record]


@pytest.fixture(scope="module")
def model(run):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.run_dir / "model").eval()


def test_every_step_is_recorded_once_and_told_in_a_line(run, steps):
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    for number in range(1, STEPS + 1):
        assert sum(f"step {number}/{STEPS}  reward" in line for line in run.lines) == 1
    assert not any("ALARM" in line for line in run.lines)
    assert run.lines[-1].startswith(f"done; model: {run.run_dir / 'model'}")


def test_engine_and_learner_agree_on_every_token(steps):
    for name in ("gap/probe_max", "gap/sampled_max"):
        gaps = [step[name] for step in steps if step[name] is not None]
        assert gaps, name
        assert max(gaps) < 1e-4
    assert all(step["gap/probe_max"] is not None for step in steps), "each publication was proven"


def test_staleness_keeps_to_its_bound(steps):
    assert steps[0]["staleness/max"] == 0
    assert max(step["staleness/max"] for step in steps) <= MAX_STALENESS


def test_no_lease_is_lost(steps):
    for number, step in enumerate(steps):
        leases = {k.removeprefix("leases/"): v for k, v in step.items() if k.startswith("leases/")}
        reasons = {k: leases.pop(k) for k in list(leases) if k.startswith("reason/")}
        assert leases.get("trained", 0) == number * BATCH
        assert leases["consumed"] == BATCH
        assert (
            leases.get("dropped", 0) == sum(reasons.values()) == reasons.get("reason/degenerate", 0)
        )
        admitted = sum(leases.values()) - leases.get("dropped", 0)
        assert admitted <= min(number + MAX_STALENESS + 1, STEPS) * BATCH


def test_tokens_are_shared_and_prefixes_are_cached(steps):
    assert all(step["tokens/unique"] > 0 for step in steps)
    decoded, delivered = (
        sum(step[f"tokens/{name}"] for step in steps) for name in ("decoded", "delivered")
    )
    assert decoded < 0.8 * delivered
    # later trees may be forked while weights change, and their prefixes are then computed anew
    assert steps[0]["cache/hit_share"] > 0.9


def test_the_first_and_the_last_weights_are_evaluated(run, records):
    evaluations = [record for record in records if "eval/greedy_accuracy" in record]
    assert [e["step"] for e in evaluations] == [0, STEPS]
    assert all(0 < e["eval/sampled_accuracy"] < 1 for e in evaluations)
    assert sum("eval policy 0.3" in line for line in run.lines) == 1


def test_the_trained_model_is_what_the_learner_published_last(run, model):
    probe = Manifest.read(run.run_dir / "weights" / f"0.{STEPS}").probe
    for token_ids, logprobs in zip(probe.token_ids, probe.logprobs, strict=True):
        found = sequence_logprobs(model, token_ids).detach().numpy()
        assert np.abs(found - logprobs).max() < 1e-4


def test_training_has_changed_the_model(run, model):
    first = Manifest.read(run.run_dir / "weights" / "0.1").probe
    found = sequence_logprobs(model, first.token_ids[0]).detach().numpy()
    assert np.abs(found - first.logprobs[0]).max() > 1e-3


def test_the_model_folder_has_a_tokenizer(run):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.run_dir / "model")
    assert tokenizer.decode(tokenizer.encode("1+2*3")).startswith("1+2*3")


def test_tensorboard_has_every_number_of_every_step(run, steps):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (run.run_dir / "tensorboard").iterdir()
    found = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            found[value.tag, event.step] = value.tensor.float_val[0]
    for step in steps:
        assert found["reward/mean", step["step"]] == pytest.approx(step["reward/mean"], rel=1e-5)
        assert found["learner/loss", step["step"]] == pytest.approx(step["learner/loss"], rel=1e-5)


def test_the_config_of_the_run_can_be_read_again(run):
    saved = load(run.run_dir / "config.yaml")
    asked = parse([*WORDS, f"run_dir={run.run_dir}"])
    resolved = [f"tree.max_response_tokens={asked.tree.segment_tokens * asked.tree.max_depth}"]
    resolved += ["engine.context_length=512"]
    assert saved == parse([*WORDS, f"run_dir={run.run_dir}", *resolved])


def test_what_happened_is_kept_in_the_event_log(run):
    lines = (run.run_dir / "events.jsonl").read_text().splitlines()
    events = [(event["role"], event["event"]) for event in map(json.loads, lines)]
    assert {role for role, kind in events if kind == "ready"} == {
        "engine-0", "learner-0", "replay-0", "actor-0", "actor-1",
    }  # fmt: skip
    assert events.count(("engine-0", "weights")) == STEPS
    assert events.count(("actor-0", "eval")) == 2
    assert ("learner-0", "done") in events


def test_the_time_of_every_process_is_booked_and_told(run, steps):
    (verdict,) = [verdict for verdict in verify_run(run.run_dir) if verdict.name == "time"]
    assert verdict.holds, verdict.text
    sums = totals(map(json.loads, (run.run_dir / "events.jsonl").read_text().splitlines()))
    assert set(sums) == {"learner", "actor", "engine", "replay"}
    for record in steps:
        for kind in sums:
            shares = [record[f"ledger/{kind}/{category}"] for category in Category]
            assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert {kind for kind, of_kind in sums.items() if of_kind.get("eval")} == {"actor", "engine"}
    learner, actor, engine = (sums[kind] for kind in ("learner", "actor", "engine"))
    assert min(learner["compute"], learner["wait_data"], learner["sync"]) > 0
    assert min(actor["compute"], actor["wait_data"], actor["wait_queue"]) > 0
    # the updates of the engine, by the ledger and by what is told of each
    paused = sum(record["weights/pause_s"] for record in steps)
    assert engine["sync"] == pytest.approx(paused, rel=0.1)
    assert any(line.startswith("learner ") for line in run.lines), "the table"


def test_the_trace_of_the_run_keeps_the_rules_of_its_format(run, steps):
    trace = chrome_trace(read_trace(run.run_dir))
    assert faults_of(trace) == []
    spans = Counter(event["name"] for event in trace["traceEvents"] if event["ph"] == "X")
    assert spans["train"] == spans["publish"] == spans["update"] == STEPS
    arrived = sum(step.get(f"trees/{outcome}", 0) for step in steps for outcome in OUTCOMES)
    assert spans["grow"] >= arrived >= STEPS * BATCH
    assert spans["evaluate"] == 2


def test_nothing_of_the_run_is_left(run):
    assert run.num_seen() > 10
    assert run.alive() == []
