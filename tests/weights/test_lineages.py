import pytest

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore
from treepo_async.weights.lineages import LINEAGES_FILE, Lineages


def test_where_each_lineage_began_is_read_back_by_whoever_comes_next(tmp_path):
    folder = tmp_path / "checkpoints"
    assert Lineages(folder).origins() == {}
    Lineages(folder).begin(0, PolicyVersion(0, 0))
    Lineages(folder).begin(1, PolicyVersion(0, 12))
    assert Lineages(folder).origins() == {0: PolicyVersion(0, 0), 1: PolicyVersion(0, 12)}
    assert CheckpointStore(folder, keep=1).versions() == [], "it is taken for no checkpoint"


def test_a_lineage_begins_once(tmp_path):
    Lineages(tmp_path).begin(1, PolicyVersion(0, 12))
    with pytest.raises(WeightsError, match=r"lineage 1 began from 0\.12 before"):
        Lineages(tmp_path).begin(1, PolicyVersion(0, 14))
    assert Lineages(tmp_path).origins() == {1: PolicyVersion(0, 12)}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"1": 2}', '{"x": "0.1"}', '{"1": "0"}'])
def test_a_damaged_file_is_told_of_with_the_way_out(tmp_path, text):
    (tmp_path / LINEAGES_FILE).write_text(text)
    with pytest.raises(WeightsError, match=r"lineages\.json is damaged: .*; remove it to go on"):
        Lineages(tmp_path).origins()
