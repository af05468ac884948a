"""Each invariant on an account that keeps it, and on accounts that break it in one way each."""

from dataclasses import replace

import pytest

from treepo_async.cluster.invariants import (
    Account,
    Delivery,
    Verdict,
    acks_kept,
    conserved,
    folders_whole,
    fresh_found,
    fresh_told,
    letters_kept,
    log_whole,
    moved_never,
    results_repeat,
    same_account,
    steps_told,
    trained_once,
    trees_there,
)
from treepo_async.replay.entry import Row
from treepo_async.replay.state import Counts, StepRow


def row(index, state, *, step=None, reason=""):
    return Row(index, state, 1, "", (), step, None, reason)


ROWS = (
    row(0, "trained", step=0),
    row(1, "dropped", reason="degenerate"),
    row(2, "trained", step=0),
    row(3, "trained", step=1),
    row(4, "quarantined", reason="too_many_attempts"),
    row(5, "trained", step=1),
    row(6, "consumed", step=2),
    row(7, "consumed", step=2),
    row(8, "accepted"),
    row(9, "leased"),
    row(10, "waiting"),
)
COUNTS = Counts(
    next_index=11,
    next_step=3,
    num_retired=1,
    ended={"trained": 2, "dropped": 1, "quarantined": 1},
)
WHOLE = Account(
    COUNTS,
    ROWS,
    (StepRow(0, 0, "aa"), StepRow(0, 1, "bb"), StepRow(1, 1, "bb"), StepRow(1, 2, "")),
    {index: (1, 100 + index) for index in (3, 5, 6, 7, 8)},
)


def with_row(index, **changes):
    rows = tuple(r._replace(**changes) if r.prompt_index == index else r for r in ROWS)
    return replace(WHOLE, rows=rows)


def with_counts(**changes):
    return replace(WHOLE, counts=replace(COUNTS, **changes))


def fails(verdict, *words):
    assert not verdict.holds, verdict
    assert all(word in verdict.text for word in words), verdict.text


def holds(verdict, text):
    assert verdict.holds, verdict
    assert verdict.text == text


def test_a_line_says_whether_it_holds():
    assert Verdict("log", holds=True, text="3 records").line() == "ok      log            3 records"
    assert Verdict("log", holds=False, text="gone").line().startswith("FAILED  log ")


def test_trees_of_accepted_prompts_and_of_kept_batches_are_wanted():
    assert [r.prompt_index for r in WHOLE.needed()] == [3, 5, 6, 7, 8]
    holds(trees_there(WHOLE, {}), "5 trees are wanted, 5 read back")


def test_a_missing_and_a_damaged_tree_are_named():
    trees = {index: tree for index, tree in WHOLE.trees.items() if index != 8}
    fails(trees_there(replace(WHOLE, trees=trees), {}), "not stored: 8")
    fails(trees_there(WHOLE, {5: "cut short"}), "4 read back", "damaged: 5 (cut short)")


def test_damage_of_a_tree_that_is_not_wanted_any_more_is_no_harm():
    assert trees_there(WHOLE, {0: "cut short"}).holds


ACKED = [Delivery(index, 1, 100 + index) for index in (0, 1, 2, 3, 4, 5, 6, 7, 8)]


def test_acknowledged_trees_are_stored_or_have_come_to_an_end():
    holds(acks_kept(WHOLE, ACKED), "9 acknowledged, 0 lost")


@pytest.mark.parametrize(
    "ack",
    [
        Delivery(9, 1, 109),
        Delivery(11, 1, 111),
        Delivery(8, 2, 108),
        Delivery(8, 1, 7),
        Delivery(3, 1, 7),
    ],
    ids=["leased again", "never leased", "another attempt", "other bytes", "other in its batch"],
)
def test_an_acknowledged_tree_that_is_not_the_stored_one_is_lost(ack):
    fails(acks_kept(WHOLE, [*ACKED, ack]), "1 lost", f"{ack.prompt_index} attempt {ack.attempt}")


def test_what_replay_says_it_gave_back_is_not_lost():
    holds(
        acks_kept(WHOLE, [Delivery(10, 1, 1)], {10}),
        "1 acknowledged, 0 lost, 1 given back by replay: 10 attempt 1",
    )
    both = [Delivery(10, 1, 1), Delivery(9, 1, 1)]
    fails(acks_kept(WHOLE, both, {10}), "1 lost: 9 attempt 1, 1 given back", "10 attempt 1")
    told = with_counts(reasons={"stale_accepted": 9})
    fails(acks_kept(told, both), "2 lost")


REBUILT = replace(
    WHOLE,
    rows=ROWS[3:],
    rebuilt_from=Counts(next_index=4, num_retired=1, ended={"trained": 2, "dropped": 1}),
)


def test_an_account_whose_beginning_is_gone_is_checked_from_where_it_begins():
    reach = "(rows from prompt 4 on; the index was rebuilt)"
    holds(trained_once(REBUILT), f"4 prompts in 2 steps {reach}")
    assert conserved(REBUILT).holds
    assert conserved(REBUILT).text.endswith(f"5 pending + 3 without a row {reach}")
    holds(acks_kept(REBUILT, ACKED), f"9 acknowledged, 0 lost {reach}")


@pytest.mark.parametrize("index", range(4, 11))
def test_of_what_came_later_nothing_may_be_missing(index):
    rows = tuple(row for row in REBUILT.rows if row.prompt_index != index)
    fails(conserved(replace(REBUILT, rows=rows)), "rows are not those of prompts 4..10")
    fails(conserved(replace(REBUILT, rebuilt_from=Counts(next_index=3))), "are counted")


def test_each_prompt_is_trained_in_one_step():
    holds(trained_once(WHOLE), "6 prompts in 3 steps")


def test_a_step_without_prompts_out_of_order_or_of_another_size_is_found():
    fails(trained_once(with_row(5, step=0)), "in their order")
    fails(trained_once(with_counts(next_step=4)), "none after 2")
    fails(trained_once(with_row(7, step=None, state="accepted")), "step 2 has 1")
    fails(trained_once(replace(WHOLE, rows=(*ROWS, ROWS[0]))), "two rows: 0")


def test_a_prompt_that_changed_its_batch_is_found_unless_trees_were_lost():
    holds(moved_never([], 0), "0 prompts changed their batch")
    fails(moved_never([(3, 1, 2)], 0), "3 from 1 to 2")
    assert moved_never([(3, 1, 2)], 1).holds


def test_steps_that_were_done_again_came_out_the_same():
    holds(results_repeat(WHOLE.steps), "2 steps, 1 done again, 0 with another result")
    other = [*WHOLE.steps, StepRow(2, 1, "cc")]
    fails(results_repeat(other), "1 with another", "step 1 is bb in lineage 0", "cc in lineage 2")


def test_prompts_are_conserved():
    holds(
        conserved(WHOLE),
        "11 issued = 4 trained + 2 ended otherwise (1 degenerate, 1 too_many_attempts) + 5 pending",
    )


@pytest.mark.parametrize(
    "account",
    [
        replace(WHOLE, rows=ROWS[:-1]),
        replace(WHOLE, rows=ROWS[1:]),
        with_counts(next_index=12),
        with_counts(ended={"trained": 3, "dropped": 1, "quarantined": 1}),
        with_counts(ended={"trained": 2, "dropped": 1}),
        with_row(1, state="waiting"),
    ],
)
def test_a_prompt_too_many_or_too_few_is_found(account):
    fails(conserved(account))


def test_staleness_beyond_the_bound_is_found_in_what_was_told_and_in_what_lies_there():
    told = [{"step": 1, "staleness/max": 0}, {"step": 2, "staleness/max": 2}]
    holds(fresh_told(told, 2), "at most 2 of 2 in 2 records")
    fails(fresh_told(told, 1), "at steps 2")
    holds(fresh_found({3: 1, 5: 2}, 2), "at most 2 of 2 in 2 stored trees")
    fails(fresh_found({3: 1, 5: 2}, 1), "5 is 2 old")


def test_each_step_is_judged_by_the_bound_that_it_was_told_with():
    told = [
        {"step": 1, "staleness/max": 2, "staleness/bound": 2},
        {"step": 2, "staleness/max": 1, "staleness/bound": 1},
        {"step": 3, "staleness/max": None, "staleness/bound": 1},
    ]
    holds(fresh_told(told, 1), "at most 2 of 1/2 in 2 records")
    told[1]["staleness/max"] = 2
    fails(fresh_told(told, 9), "at steps 2")
    assert fresh_found({3: 1, 5: 2}, 1, {5: 2}).holds
    fails(fresh_found({3: 1, 5: 2}, 3, {5: 1}), "5 is 2 old")


def test_an_index_that_differs_from_the_log_is_found():
    assert same_account(WHOLE, WHOLE).holds
    late = replace(WHOLE, counts=replace(COUNTS, published=3))
    fails(same_account(WHOLE, late), "counts")
    fails(same_account(with_row(8, state="waiting"), WHOLE), "rows that differ: 8")
    fails(same_account(replace(WHOLE, trees={}), WHOLE), "trees that differ: 3, 5, 6 and 2 more")
    fails(same_account(replace(WHOLE, steps=WHOLE.steps[1:]), WHOLE), "steps that differ: (0, 0)")


def test_rows_of_ended_prompts_may_be_older_than_the_log():
    assert same_account(WHOLE, replace(WHOLE, rows=ROWS[3:], steps=WHOLE.steps[1:])).holds


def test_damage_of_the_log_is_told():
    holds(log_whole(1_200, 34_567, []), "1,200 records, 34,567 bytes")
    fails(log_whole(3, 100, ["12 bytes at 1:40"]), "12 bytes at 1:40")


def test_folders_are_told_one_by_one():
    holds(folders_whole("checkpoints", {}), "0 of 0 whole (none)")
    holds(folders_whole("checkpoints", {"0.2": "", "0.4": ""}), "2 of 2 whole (0.2, 0.4)")
    fails(folders_whole("checkpoints", {"0.2": "", "0.4": "it is damaged"}), "1 of 2", "damaged")


def test_prompts_that_were_given_up_are_written_down():
    letters = [{"prompt_index": 4, "reason": "lease_expired"}]
    holds(letters_kept(WHOLE, letters), "1 prompts given up, 1 written down: 4 (lease_expired)")
    fails(letters_kept(WHOLE, []), "missing: 4")


def records(*versions):
    return [{"learner/lineage": lineage, "step": step} for lineage, step in versions]


def test_records_of_steps_follow_each_other_and_a_gap_lies_between_lineages():
    told = records((0, 1), (0, 2), (0, 3), (1, 3), (1, 4), (3, 6))
    holds(steps_told(told), "6 steps told, in 3 lineages, up to 6; 1 untold: 5")
    holds(steps_told([]), "0 steps told, in 0 lineages, up to 0")
    fails(steps_told(records((0, 1), (0, 3))), "0.3 after 0.1")
    fails(steps_told(records((0, 1), (0, 1))), "0.1 after 0.1")
    fails(steps_told(records((1, 1), (0, 2))), "0.2 after 1.1")
