import pytest

from treepo_async.metrics.console import alarm_line, eval_line, step_line

RECORD = {
    "step": 4,
    "reward/mean": 0.1234,
    "accuracy/train": 0.5,
    "accuracy/sampled": 0.456,
    "staleness/mean": 0.75,
    "staleness/max": 1,
    "tokens/decoded": 800,
    "tokens/delivered": 1600,
    "tokens/decoded_per_delivered": 0.5,
    "idle/learner": 0.253,
    "idle/engine": 0.1,
    "gap/probe_max": 2e-6,
    "gap/sampled_max": 3.4e-5,
    "weights/pause_s": 0.416,
    "time/wall_s": 12.34,
}


def test_a_step_is_one_line():
    assert step_line(RECORD, 60) == (
        "step  4/60  reward +0.123  acc 0.50 (all 0.46)  stale 0.75 max 1  tokens 800/1600 = 0.50  "
        "idle learner 25% engine 10%  gap 3e-05  pause 0.42 s  12.3 s"
    )


def test_missing_values_are_dashes():
    absent = ("accuracy/sampled", "tokens/decoded_per_delivered", "idle/engine", "gap/probe_max",
              "gap/sampled_max", "weights/pause_s", "reward/mean", "accuracy/train")  # fmt: skip
    assert step_line({**RECORD, **dict.fromkeys(absent)}, 7) == (
        "step 4/7  reward -  acc - (all -)  stale 0.75 max 1  tokens 800/1600 = -  "
        "idle learner 25% engine -  gap -  pause - s  12.3 s"
    )


@pytest.mark.parametrize("known", ["gap/probe_max", "gap/sampled_max"])
def test_one_gap_is_enough(known):
    gaps = {"gap/probe_max": None, "gap/sampled_max": None, known: 1e-3}
    assert "gap 1e-03" in step_line({**RECORD, **gaps}, 60)


def test_an_evaluation_is_one_line():
    event = {
        "version": "0.10",
        "sampled_accuracy": 0.5,
        "greedy_accuracy": 0.6254,
        "num_problems": 64,
        "num_samples": 1,
        "seconds": 3.21,
    }
    assert eval_line(event) == (
        "eval policy 0.10  sampled 0.500  greedy 0.625  on 64 held-out problems  3.2 s"
    )
    assert eval_line({**event, "num_samples": 8, "pass_at_k": 0.9}) == (
        "eval policy 0.10  sampled 0.500  pass@8 0.900  greedy 0.625  on 64 held-out problems  3.2 s"
    )


def test_an_alarm_is_one_line_with_the_first_line_of_each_detail():
    event = {"event": "alarm", "alarm": "engine restarted", "version": "0.3", "detail": "died\ntrace"}  # fmt: skip
    assert alarm_line("engine-0", event) == (
        "ALARM engine-0: engine restarted  version=0.3  detail=died"
    )


@pytest.mark.parametrize(
    ("detail", "shown"), [("", "detail="), (None, "detail=None"), ("\n\n", "detail=")]
)
def test_an_alarm_with_an_empty_detail_is_shown_all_the_same(detail, shown):
    event = {"event": "alarm", "alarm": "odd", "detail": detail}
    assert alarm_line("replay-0", event) == f"ALARM replay-0: odd  {shown}"


def test_an_alarm_without_details_is_its_name():
    assert alarm_line("replay-0", {"event": "alarm", "alarm": "odd"}) == "ALARM replay-0: odd"


def test_a_batch_from_a_file_is_told_as_offline():
    record = {**RECORD, "staleness/mean": None, "staleness/max": None}
    assert "(all 0.46)  offline  tokens" in step_line(record, 60)
