import numpy as np

from tests.fakes import events_in
from treepo_async.replay.report import report_facts
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)
from treepo_async.wire.codec import encode_tree
from treepo_async.wire.facts import facts_of


def segment(parent, level, num_tokens, stop=None):
    ids = np.full(num_tokens, 7, np.int32)
    logprobs = np.full(num_tokens, -1.0, np.float32)
    return Segment(parent, level, ids, logprobs, PolicyVersion(0, 0), stop)


def test_the_length_of_trajectories_is_told_with_and_without_the_bias_of_forks(capsys):
    tree = Tree(
        prompt=Prompt("p", np.array([1], np.int32), "", ""),
        segments=(
            segment(ROOT, 0, 1, StopReason.EOS),
            segment(ROOT, 0, 4),
            segment(1, 1, 4, StopReason.LENGTH),
            segment(1, 1, 4, StopReason.LENGTH),
            segment(ROOT, 0, 4, StopReason.PRUNED),
        ),
        rewards_L=np.array([1, 1, 0, np.nan], np.float32),
        accuracies_L=np.array([1, 1, 0, np.nan], np.float32),
        sampling=Sampling(1.0, 4, 2, 3, 2),
        provenance=Provenance("lease", "actor", num_pruned=1, saved_tokens=5),
    )
    tree.check()
    report_facts(facts_of(encode_tree(tree)), "accepted")
    (event,) = events_in(capsys.readouterr().out, "tree")
    assert (event["num_leaves"], event["num_pruned"], event["saved_tokens"]) == (3, 1, 5)
    # 1, 8 and 8 tokens; the short path counts a third, the long ones a sixth each
    assert event["delivered_tokens"] / event["num_leaves"] == 17 / 3
    assert np.isclose(event["weighted_tokens"] / event["weight_sum"], (1 / 3 + 8 / 3) / (2 / 3))
