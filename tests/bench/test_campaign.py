"""The campaign's order of things, with commands that take no time."""

import json
import sys
from dataclasses import replace

import pytest

from treepo_async.bench import campaign
from treepo_async.bench.campaign_parts import Part, Result, parts_of
from treepo_async.bench.campaign_report import summary
from treepo_async.bench.markdown import markdown
from treepo_async.errors import ConfigError

CPU = {"device": "cpu"}


def part(name, code, *, needs=(), limit_s=30.0):
    return Part(name, (sys.executable, "-c", code), needs, limit_s)


def outcomes(parts, out, device=CPU):
    return {r.name: (r.outcome, r.reason) for r in campaign.run(parts, out, device, lambda _: None)}


def test_a_part_that_fails_stops_no_other_and_says_where_its_output_is(tmp_path, capsys):
    parts = [part("a", "print('why'); raise SystemExit(3)"), part("b", "print('fine')")]
    assert outcomes(parts, tmp_path) == {
        "a": ("FAILED", "exit code 3, see a.log"),
        "b": ("passed", ""),
    }
    assert (tmp_path / "b.log").read_text() == "fine\n"
    assert capsys.readouterr().out == "why\n"


def test_a_part_without_its_packages_is_skipped_and_names_them(tmp_path):
    missing = part("a", "", needs=("json", "no_such_package", "nor_this"))
    expected = ("skipped", "not installed: no_such_package, nor_this")
    assert outcomes([missing], tmp_path) == {"a": expected}
    page = (tmp_path / "campaign.md").read_text()
    assert "| a | skipped | 0 | not installed: no_such_package, nor_this |" in page


def test_a_part_that_is_not_done_in_time_has_failed(tmp_path):
    slow = part("a", "import time; time.sleep(60)", limit_s=0.5)
    outcome, reason = outcomes([slow], tmp_path)["a"]
    assert (outcome, reason) == ("FAILED", "not done after 0 s, see a.log")


def test_what_passed_is_kept_and_what_failed_runs_again(tmp_path):
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    parts = [part("a", count), part("b", count + "; raise SystemExit(1)")]
    outcomes(parts, tmp_path)
    assert outcomes(parts, tmp_path)["a"] == ("kept", "")
    assert (tmp_path / "runs").read_text() == "xxx"
    # kept twice is kept, and another device or command is another measurement
    assert outcomes(parts[:1], tmp_path)["a"] == ("kept", "")
    assert outcomes(parts[:1], tmp_path, {"device": "other"})["a"] == ("passed", "")
    assert outcomes([part("a", count + "; 0")], tmp_path)["a"] == ("passed", "")


def test_the_parts_that_were_not_asked_for_stay_in_the_report(tmp_path):
    outcomes([part("a", "")], tmp_path)
    outcomes([part("b", "")], tmp_path)
    found = json.loads((tmp_path / "campaign.json").read_text())
    assert [row["name"] for row in found["parts"]] == ["a", "b"]


def test_a_group_means_all_its_parts_and_an_unknown_name_is_refused(tmp_path):
    def names(*words):
        return [p.name for p in campaign.chosen(words, on_cpu=False, out=tmp_path)]

    assert names("weights", "memory") == ["memory", "weights-0.5b", "weights-1.5b"]
    assert names("learner-7b") == ["learner-7b"]
    assert names() == [p.name for p in parts_of(on_cpu=False, out=tmp_path)]
    with pytest.raises(ConfigError, match="speed is no part; the parts are exactness-float32, "):
        names("speed")


def test_every_group_is_rehearsed_and_the_rehearsal_hides_cuda(tmp_path):
    real, rehearsed = (parts_of(on_cpu=on_cpu, out=tmp_path) for on_cpu in (False, True))
    assert {p.group for p in real} == {p.group for p in rehearsed}
    assert all(p.environment["CUDA_VISIBLE_DEVICES"] == "" for p in rehearsed)
    assert all("CUDA_VISIBLE_DEVICES" not in p.environment for p in real)
    assert len({p.name for p in real}) == len(real)


def test_the_paper_s_response_length_is_cut_in_pieces_of_every_size(tmp_path):
    lines = [p.line for p in parts_of(on_cpu=False, out=tmp_path) if p.group == "sampling"]
    assert len(lines) == 3 * 4
    assert any("shape=qwen2.5-7b depth=28 segment=250 " in line for line in lines)


def test_words_of_every_benchmark_are_ones_it_takes(tmp_path):
    from treepo_async.bench import command, learner_cells, weight_path

    of = {
        "sampling": command.parse,
        "learner": learner_cells.parse,
        "profile": learner_cells.parse,
        "weights": weight_path.parse,
    }
    for on_cpu in (False, True):
        for p in parts_of(on_cpu=on_cpu, out=tmp_path):
            if p.group in of:
                of[p.group]([word for word in p.command if "=" in word])


def test_the_summary_names_what_did_not_run_and_what_failed():
    row = Result("a", "", "passed", 1.0, "", CPU)
    rows = [
        row,
        replace(row, name="b", outcome="skipped", reason="not installed: sglang"),
        replace(row, name="c", outcome="FAILED", reason="exit code 1, see c.log"),
    ]
    assert summary(rows).splitlines() == [
        "1 passed, 1 skipped, 1 FAILED",
        "skipped: b: not installed: sglang",
        "FAILED: c: exit code 1, see c.log",
    ]
    assert markdown(("x", "y"), [(1, 2)]) == "| x | y |\n| --- | --- |\n| 1 | 2 |"
