"""Two ranks, split in each of the three ways, against one."""

import multiprocessing
import socket
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracle import random_tree

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

MICROBATCH_TOKENS = {"tp": 1, "pp": 1, "dp": 1, "dp-idle": 10**6}
"""Per case: each tree a microbatch, or all trees in one, which leaves the other data-parallel rank a filler."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def three_trees():
    rng = np.random.default_rng(6)
    trees = [random_tree(rng, temperature=0.9) for _ in range(3)]
    return trees, [rng.normal(size=len(tree.leaves)) for tree in trees]


def two_updates(model_dir, microbatch_tokens):
    """The results, the weights of this pipeline stage and the log-probs after two updates of one batch."""
    from treepo_async.learner.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.step import build_learner

    learner = build_learner(
        model_dir,
        optimizer=OptimizerSettings(learning_rate=1e-2, epsilon=1e-5, max_grad_norm=0.1),
        loss=LossSettings(),
        microbatch_tokens=microbatch_tokens,
        seed=3,
    )
    trees, advantages = three_trees()
    proximal = learner.logprobs(trees)
    results = [
        learner.train(
            trees,
            advantages,
            version=trees[0].segments[0].policy_version,
            proximal_logprobs=proximal,
        )
        for _ in range(2)
    ]
    tensors = {name: tensor.clone() for name, tensor in learner.export()}
    flat = np.concatenate([values for tree in learner.logprobs(trees) for values in tree])
    numbers = torch.tensor([[float(v) for v in asdict(r).values()] for r in results])
    return tensors | {"results": numbers, "logprobs": torch.from_numpy(flat)}


def run_rank(rank, ports, model_dirs, out):
    """One of the two processes: every case and model, one after another."""
    torch.set_num_threads(1)
    from treepo_async.config.layout import Layout
    from treepo_async.learner.groups import close_groups, open_groups

    for case, microbatch_tokens in MICROBATCH_TOKENS.items():
        open_groups(
            Layout(**{case[:2]: 2}),
            rank=rank,
            address=f"127.0.0.1:{ports[case]}",
            timeout_s=30.0,
        )
        for path in model_dirs:
            found = two_updates(path, microbatch_tokens)
            save_file(found, out / f"{case}-{path.name}-{rank}.safetensors")
        close_groups()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Where two processes have written what they found, and the models they trained."""
    from tests.oracle import tiny_qwen2

    out = tmp_path_factory.mktemp("two-ranks")
    model_dirs = [out / "untied", out / "tied"]
    for path in model_dirs:
        tiny_qwen2(tied=path.name == "tied").save_pretrained(path)
    ports = {case: free_port() for case in MICROBATCH_TOKENS}
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=run_rank, args=(r, ports, model_dirs, out)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(80)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    return out


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("case", MICROBATCH_TOKENS)
def test_a_split_learner_makes_the_updates_of_a_whole_one(two_ranks, case, name):
    expected = two_updates(two_ranks / name, MICROBATCH_TOKENS[case])
    shares = [load_file(two_ranks / f"{case}-{name}-{rank}.safetensors") for rank in range(2)]
    for key in ("results", "logprobs"):
        whole = expected.pop(key)
        for share in shares:
            torch.testing.assert_close(share.pop(key), whole, rtol=1e-4, atol=1e-4, equal_nan=True)
    for share in shares:
        for tensor_name, tensor in share.items():
            distance = (tensor - expected[tensor_name]).norm() / expected[tensor_name].norm()
            assert distance < 1e-5, tensor_name
    assert shares[0].keys() | shares[1].keys() == expected.keys()
