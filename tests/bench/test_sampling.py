from dataclasses import dataclass, field, replace

import pytest

from tests.bench.made import pair
from tests.bench.test_measure import CELL, TOKENIZER, NotingEngine, endless
from treepo_async.bench import samples
from treepo_async.bench.cells import Arm
from treepo_async.bench.command import SamplingOptions
from treepo_async.bench.sampling import measure_pair, missing_pairs, size_of
from treepo_async.errors import ConfigError

OTHER = replace(CELL, width=4)


@dataclass
class Bench:
    """Scripted clients, and the order of what was done."""

    done: list[str] = field(default_factory=list)

    def client(self):
        self.done.append("client")
        return NotingEngine(script=endless)

    async def flush(self):
        self.done.append("flush")


def of_cell(cell, *numbers):
    return [replace(s, cell=cell) for n in numbers for s in pair(n, 1.0, 1.0)]


async def test_the_arm_that_goes_first_alternates():
    firsts = []
    for number in (1, 2, 3):
        found = await measure_pair(CELL, number, Bench(), TOKENIZER)
        assert {sample.place for sample in found.values()} == {1, 2}
        firsts += [arm for arm, sample in found.items() if sample.place == 1]
    assert firsts == [Arm.TREE, Arm.INDEPENDENT, Arm.TREE]


async def test_every_arm_has_a_client_of_its_own_and_an_empty_cache():
    bench = Bench()
    await measure_pair(CELL, 1, bench, TOKENIZER)
    assert bench.done == ["flush", "client"] * 2


def test_only_pairs_that_are_not_there_are_measured(tmp_path):
    options = SamplingOptions((CELL, OTHER), 3, tmp_path)
    assert missing_pairs(options) == {CELL: [1, 2, 3], OTHER: [1, 2, 3]}
    samples.append(tmp_path / "samples.csv", of_cell(CELL, 1, 3))
    samples.append(tmp_path / "samples.csv", of_cell(OTHER, 1, 2, 3))
    assert missing_pairs(options) == {CELL: [2]}


def test_a_pair_of_which_one_arm_is_there_is_measured_again(tmp_path):
    samples.append(tmp_path / "samples.csv", of_cell(CELL, 1)[:1])
    assert missing_pairs(SamplingOptions((CELL,), 1, tmp_path)) == {CELL: [1]}


@pytest.mark.parametrize("name", ["running", "layers", "prompts", "segment"])
def test_other_settings_are_another_cell(name, tmp_path):
    samples.append(tmp_path / "samples.csv", of_cell(CELL, 1))
    other = replace(CELL, **{name: getattr(CELL, name) + 1})
    assert missing_pairs(SamplingOptions((other,), 1, tmp_path)) == {other: [1]}


def test_the_engine_holds_the_largest_cell_whole():
    size = size_of([OTHER, CELL, replace(OTHER, prompt=50)])
    assert size.cache_tokens == 2 * (6 + 8 * 13)
    assert size.context_tokens == 50 + 12 + 2
    assert size.running_requests == 8


def test_a_cell_that_does_not_fit_into_memory_is_refused():
    huge = replace(CELL, layers=10_000, hidden=8192, width=10_000)
    with pytest.raises(ConfigError, match=r"GiB of cache, .* GiB are free; take fewer prompts"):
        size_of([CELL, huge])
