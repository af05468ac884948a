import json
from dataclasses import replace

import pytest

from treepo_async.bench.async_rows import Arm
from treepo_async.bench.guard import (
    BASELINES,
    Baseline,
    Check,
    baseline_of,
    compared,
    guard,
    parse,
    read_baselines,
    table,
)
from treepo_async.bench.guard_checks import (
    all_checks,
    arm_ratio,
    async_plain_ratio,
    burst_ratio,
    codec_ratio,
    learner_plain_ratio,
    learner_ratio,
    products_s,
    sync_step_s,
    weights_ratio,
)
from treepo_async.errors import ConfigError, DataError, TreepoError
from treepo_async.wire.codec import decode_tree, encode_tree

BASE = Baseline(2.0, 0.2, (2.0,), "", "")


HERE = "this machine"


def check(*values, is_exact=False, name="part"):
    """A check that measures these, one after the other."""
    left = list(values)
    return Check(name, "a over b", "a command", lambda: left.pop(0), is_exact)


def silent(line):
    pass


@pytest.mark.parametrize(
    ("value", "verdict"), [(1.81, "ok"), (2.0, "ok"), (2.19, "ok"), (2.3, "faster")]
)
def test_a_ratio_within_its_band_or_above_passes(value, verdict):
    assert compared(check(value), BASE, silent).verdict == verdict


def test_a_ratio_below_its_band_is_measured_once_more_and_the_better_counts():
    assert compared(check(1.0, 1.9), BASE, silent).verdict == "ok"
    finding = compared(check(1.7, 1.0), BASE, silent)
    assert (finding.verdict, finding.value) == ("slower", 1.7)


def test_an_exact_ratio_is_measured_once_and_may_not_drop_at_all():
    exact = replace(BASE, band=0.0)
    assert compared(check(2.0, is_exact=True), exact, silent).verdict == "ok"
    assert compared(check(1.999, is_exact=True), exact, silent).verdict == "slower"


def test_a_drop_fails_and_names_its_check(tmp_path):
    file = tmp_path / "baselines.json"
    said = []
    guard(
        [check(2.0, 2.0, 2.0), check(3.0, 3.0, 3.0, name="other")],
        parse(["update=3"]),
        silent,
        file,
    )
    with pytest.raises(TreepoError, match=r"^part: slower"):
        guard([check(1.0, 1.0), check(3.0, name="other")], parse([]), said.append, file)
    assert "| part | a over b | 1.000 | 2.000 | -0.200 | slower |" in said[-1]
    assert "| other | a over b | 3.000 | 3.000 | -0.300 | ok |" in said[-1]


def test_a_check_without_a_baseline_fails(tmp_path):
    with pytest.raises(TreepoError, match="without one"):
        guard([check(1.0)], parse([]), silent, tmp_path / "none.json")


def test_a_band_is_three_spreads_and_at_least_a_tenth():
    assert baseline_of(check(), [2.0, 2.0, 2.0]).band == pytest.approx(0.2)
    assert baseline_of(check(), [1.0, 2.0, 3.0]).band == pytest.approx(3.0)
    assert baseline_of(check(is_exact=True), [2.0]).band == 0.0


def test_an_update_leaves_the_baselines_of_others(tmp_path):
    file = tmp_path / "baselines.json"
    checks = [check(*[1.0] * 6, name="a"), check(*[5.0] * 3, name="b")]
    guard(checks, parse(["update=3"]), silent, file)
    guard([check(*[9.0] * 3, name="a"), checks[1]], parse(["update=3", "only=a"]), silent, file)
    assert {name: base.value for name, base in read_baselines(file).items()} == {"a": 9.0, "b": 5.0}


def test_baselines_are_measured_in_turn_so_that_checks_of_one_command_share_its_runs(tmp_path):
    order = []
    checks = [
        Check(name, "", "", lambda name=name: order.append(name) or 1.0, is_exact)
        for name, is_exact in (("a", False), ("b", True), ("c", False))
    ]
    guard(checks, parse(["update=3"]), silent, tmp_path / "baselines.json")
    assert "".join(order) == "abcacac"


def test_every_check_has_a_committed_baseline_and_none_is_left_over():
    assert set(read_baselines(BASELINES)) == {check.name for check in all_checks()}


@pytest.mark.parametrize("name", ["sim", "trees"])
def test_what_is_simulated_comes_out_as_it_was(name):
    (found,) = (check for check in all_checks() if check.name == name)
    assert compared(found, read_baselines(BASELINES)[name], silent).verdict == "ok"


def test_a_codec_that_is_slowed_down_turns_its_check_red():
    def slow(tree):
        return [decode_tree(encode_tree(tree)) for _ in range(3)]

    (codec,) = (check for check in all_checks() if check.name == "codec")
    slowed = replace(codec, measure=lambda: codec_ratio(slow))
    assert compared(slowed, read_baselines(BASELINES)["codec"], silent).verdict == "slower"


def test_ratios_of_processor_time_are_of_sums_over_all_rounds():
    def rows(column, clock, **seconds):
        return [{column: name, clock: str(s)} for name, each in seconds.items() for s in each]

    ways = rows("way", "cpu_s", flat=[2.0, 4.0], tree=[1.0, 2.0], padded=[9.0])
    assert learner_ratio(ways) == 2.0
    bursts = rows("arm", "replay_cpu_s", bare=[0.01, 0.03], wire=[0.04, 0.04], single=[1.0])
    assert burst_ratio(bursts, "bare", "wire") == 0.5


def test_what_slows_both_ways_of_the_learner_down_shows_against_fixed_products_alone():
    def rows(factor):
        return [{"way": way, "cpu_s": f"{factor * s}"} for way, s in (("flat", 4.0), ("tree", 2.0))]

    assert learner_ratio(rows(2)) == learner_ratio(rows(1)) == 2.0
    assert (learner_plain_ratio(rows(1), 0.5), learner_plain_ratio(rows(2), 0.5)) == (0.25, 0.125)
    assert products_s(rounds=1) > 0


def test_what_slows_both_arms_down_shows_against_the_script_alone():
    def rows(factor):
        arms = (("sync", 4.0), ("async_inflight", 2.0))
        return [
            {"arm": a, "tokens_per_s": f"{1 / (factor * s)}", "step_s": f"{factor * s}"}
            for a, s in arms
        ]

    ratios = [arm_ratio(rows(factor), Arm.ASYNC_INFLIGHT, Arm.SYNC) for factor in (1, 2)]
    assert ratios == pytest.approx([2.0, 2.0])
    assert [async_plain_ratio(rows(factor), 3.0) for factor in (1, 2)] == [0.75, 0.375]
    # a batch is trained in one second and has no wait of its own in a script
    assert 2.0 < sync_step_s() < 4.0


def test_ratios_of_arms_and_of_updates():
    rates = [{"arm": "sync", "tokens_per_s": "10"}, {"arm": "async_inflight", "tokens_per_s": "25"}]
    assert arm_ratio(rates, Arm.ASYNC_INFLIGHT, Arm.SYNC) == 2.5
    updates = [
        {"arm": arm, "copy_s": "1", "visible_s": visible}
        for arm, visible in [("disk", "2"), ("disk", "4"), ("disk", "4"), ("broadcast-1", "1")]
    ]
    assert weights_ratio(updates, "disk") == 0.25


def test_words_and_files_that_are_wrong_are_named(tmp_path):
    with pytest.raises(ConfigError, match="update=2 must be"):
        parse(["update=2"])
    with pytest.raises(ConfigError, match="only=b is no check; they are part"):
        guard([check(1.0)], parse(["only=b"]), silent, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps({"a": {"value": 1}}))
    with pytest.raises(DataError, match="has no baselines"):
        read_baselines(tmp_path / "bad.json")


def test_the_table_says_where_a_baseline_is_missing():
    finding = compared(check(1.0), None, silent)
    assert "| part | a over b | 1.000 |  |  | no baseline |" in table([finding], HERE)


def test_the_table_says_which_baselines_are_of_another_machine_unless_they_hold_on_all():
    def finding(name, machine, is_exact=False):
        base = replace(BASE, machine=machine)
        return compared(check(2.0, name=name, is_exact=is_exact), base, silent)

    own, other, exact = (
        finding("own", HERE),
        finding("other", "64 cores"),
        finding("exact", "64 cores", True),
    )
    text = table([own, other, exact], HERE)
    assert "This machine is this machine. The baselines of other are of another: 64 cores." in text
    assert "another" not in table([own, exact], HERE)
