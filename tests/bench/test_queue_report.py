from treepo_async.bench.queue_replay import Arm
from treepo_async.bench.queue_report import (
    latency_line,
    round_line,
    summaries_of,
    table,
    write_table,
)
from treepo_async.bench.queue_samples import Burst, Latency, append


def burst(arm, wall_s, *, tokens=100, number=1, trees=10):
    return Burst(arm, tokens, 4, 16, 2, number, 1, trees, wall_s, 0.001, 8000, 9000)


def rounds(*seconds):
    return [
        burst(arm, wall_s, number=number)
        for number, row in enumerate(seconds, start=1)
        for arm, wall_s in zip(Arm, row, strict=True)
    ]


def test_ratios_are_taken_within_rounds_before_the_median():
    # the machine is 10 times slower in the second round; ratios do not see it
    slow = rounds((1, 2, 4, 16), (10, 20, 40, 160), (1, 2, 4, 16))
    (summary,) = summaries_of(slow)
    assert summary.ratio(Arm.WIRE, Arm.BARE).low == summary.ratio(Arm.WIRE, Arm.BARE).high == 0.5
    assert summary.ratio(Arm.DURABLE, Arm.SINGLE).median == 4
    assert summary.rate(Arm.BARE).median == 10


def test_sizes_stand_in_rows_of_their_own_the_largest_first():
    found = [*rounds((1, 1, 1, 1)), *(burst(arm, 1, tokens=200) for arm in Arm)]
    assert [summary.tokens for summary in summaries_of(found)] == [200, 100]
    head, _, first, second = table(summaries_of(found)).splitlines()
    assert first.startswith("| 200 |")
    assert second.startswith("| 100 |")
    assert head.count("|") == first.count("|")


def test_bytes_are_counted_for_each_unique_token():
    sample = burst(Arm.DURABLE, 2.0)
    assert (sample.wire_bytes_per_token, sample.disk_bytes_per_token) == (8.0, 9.0)
    assert (sample.trees_per_s, sample.mb_per_s) == (5.0, 0.004)


def test_the_table_ends_with_latency(tmp_path):
    latency = Latency(Arm.DURABLE, 100, 50, 25.0, 0.001, 0.02, 0.5)
    write_table(tmp_path / "table.md", summaries_of(rounds((1, 2, 4, 16))), [latency], [])
    text = (tmp_path / "table.md").read_text()
    assert text.rstrip().endswith(latency_line(latency).strip())
    assert "p50 1.0 ms, p99 20.0 ms" in text


def test_rows_of_a_kind_are_appended_below_one_header(tmp_path):
    append(tmp_path / "bursts.csv", [burst(Arm.BARE, 1.0)])
    append(tmp_path / "bursts.csv", [burst(Arm.WIRE, 2.0)])
    append(tmp_path / "bursts.csv", [])
    head, first, second = (tmp_path / "bursts.csv").read_text().splitlines()
    assert head.startswith("arm,tokens,")
    assert first.startswith("bare,100,")
    assert second.split(",")[0] == "wire"


def test_a_round_is_one_line():
    assert round_line([burst(Arm.BARE, 0.001)]) == "  trees/s: bare 10,000"
