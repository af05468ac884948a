import pytest

from treepo_async.learner.start import Start
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import TrainingState


def versions(*texts):
    return [PolicyVersion.parse(text) for text in texts]


@pytest.mark.parametrize(
    ("loaded", "saved", "published", "begun", "lineage", "version", "newest"),
    [
        (None, [], [], 0, 0, "0.0", -1),
        (None, [], ["0.1", "0.2"], 1, 0, "1.0", 2),
        (None, [], [], 1, 0, "1.0", -1),
        ("0.2", ["0.2"], ["0.1", "0.2", "0.3"], 1, 0, "1.2", 3),
        ("0.2", ["0.2"], ["0.1", "0.2", "0.3"], 3, 0, "3.2", 3),
        ("1.4", ["1.4"], ["0.4", "1.4", "1.5"], 0, 0, "2.4", 5),
        ("1.4", ["1.4"], [], 2, 2, "2.4", -1),
        ("0.2", ["0.2", "1.4"], [], 0, 1, "2.2", -1),
        ("0.2", ["0.2"], [], 1, 5, "5.2", -1),
    ],
)
def test_whoever_begins_again_takes_a_lineage_that_nobody_had(
    loaded, saved, published, begun, lineage, version, newest
):
    state = None if loaded is None else TrainingState(loaded, 1, "tp1", "", [[1, 2]])
    start = Start.of(
        state,
        published=versions(*published),
        saved=versions(*saved),
        origins=dict.fromkeys(range(begun), PolicyVersion(0, 0)),
        lineage=lineage,
    )
    assert (str(start.version), start.newest_published) == (version, newest)
    assert str(start.origin) == (loaded or "0.0")


def test_it_knows_which_names_its_weights_had_before():
    state = TrainingState("1.4", 1, "tp1", "", [], ancestry={"0": 3})
    start = Start.of(
        state,
        published=[],
        saved=versions("1.4"),
        origins=dict(enumerate(versions("0.0", "0.2"))),
        lineage=0,
    )
    found = [str(start.ancestry.canonical(v)) for v in versions("0.3", "0.4", "1.4", "1.5")]
    assert found == ["2.3", "0.4", "2.4", "1.5"]
