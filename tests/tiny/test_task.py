"""What holds for every built-in task."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.config.schema import BUILT_IN
from treepo_async.scoring.exact import exact
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.recipe import DEFAULT_ARCHITECTURE
from treepo_async.tiny.task import is_heldout
from treepo_async.tiny.tokenizer import build_tokenizer

SEEDS = st.integers(0, 2**32)
INDICES = st.integers(0, 10**9)
RESPONSE_TOKENS = 70
"""Of the default tree: 7 segments of 10."""

every_task = pytest.mark.parametrize("task", [b.task for b in BUILT_INS.values()], ids=BUILT_INS)


def test_every_name_of_the_config_is_a_task():
    assert tuple(BUILT_INS) == BUILT_IN
    assert [built_in.name for built_in in BUILT_INS.values()] == list(BUILT_IN)


@every_task
def test_no_training_question_is_ever_held_out(task):
    @settings(deadline=None)
    @given(SEEDS, SEEDS, INDICES, INDICES)
    def disjoint(seed, other_seed, index, other_index):
        training = task.problem(seed, index, heldout=False)
        heldout = task.problem(other_seed, other_index, heldout=True)
        assert training.question != heldout.question
        assert not is_heldout(training.question)
        assert is_heldout(heldout.question)
        shown = task.demonstration(seed, index, p_hurried=0.5, p_slip=0.1)
        assert not is_heldout(shown.problem.question)

    disjoint()


@every_task
def test_a_careful_demonstration_scores_and_its_problem_is_one_of_the_task(task):
    for index in range(50):
        shown = task.demonstration(0, index, p_hurried=0.0, p_slip=0.0)
        assert exact(shown.response, shown.problem.answer) == 1
        assert "\n" not in shown.problem.question


@pytest.mark.parametrize("name", BUILT_INS)
def test_problems_are_the_same_in_every_process_and_order(name):
    code = (
        "from treepo_async.tiny.built_in import BUILT_INS;"
        f"print([BUILT_INS[{name!r}].task.problem(3, i, False).question for i in (5, 1)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    problem = BUILT_INS[name].task.problem
    assert printed.strip() == str([problem(3, i, heldout=False).question for i in (5, 1)])


@every_task
def test_different_seeds_and_indices_give_different_problems(task):
    questions = {task.problem(s, i, heldout=False).question for s in (0, 1) for i in range(200)}
    assert len(questions) > 380


@pytest.mark.parametrize("built_in", BUILT_INS.values(), ids=BUILT_INS)
def test_a_demonstration_fits_the_default_tree(built_in):
    tokenizer, recipe = build_tokenizer(), built_in.recipe
    for index in range(200):
        shown = built_in.task.demonstration(
            0, index, p_hurried=recipe.p_hurried, p_slip=recipe.p_slip
        )
        token_ids = tokenizer.encode(shown.response).ids
        assert 20 <= len(token_ids) <= RESPONSE_TOKENS
        assert max(token_ids) < DEFAULT_ARCHITECTURE.vocab_size


@pytest.mark.parametrize("built_in", BUILT_INS.values(), ids=BUILT_INS)
def test_demonstrations_are_of_mixed_quality(built_in):
    recipe = built_in.recipe
    quality = {"p_hurried": recipe.p_hurried, "p_slip": recipe.p_slip}
    shown = [built_in.task.demonstration(0, i, **quality) for i in range(1000)]
    num_right = sum(exact(d.response, d.problem.answer) for d in shown)
    assert 350 < num_right < 620


def test_importing_the_tasks_needs_no_torch():
    code = (
        "import sys, treepo_async.tiny.built_in, treepo_async.tiny.cache;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
