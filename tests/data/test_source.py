import json
from contextlib import suppress
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.config.schema import DataConfig
from treepo_async.data.source import EndOfData, FileOrder, Skipped, open_source
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.errors import ConfigError, DataError
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.task import is_heldout
from treepo_async.tiny.tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, max_tokens=512)
    return TextTokenizer.load(folder)


@pytest.fixture
def opened(tokenizer):
    def open_with(data, **changes):
        run = {
            "seed": changes.pop("seed", 0),
            "max_prompt_tokens": changes.pop("max_prompt_tokens", 100),
        }
        section = DataConfig(path=str(data), **{"instruction": "", **changes})
        return open_source(section, tokenizer=tokenizer, **run)

    return open_with


def write(path, questions):
    path.write_text("\n".join(json.dumps({"question": q, "answer": "1"}) for q in questions))
    return path


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "train.jsonl", [f"how much is {i}?" for i in range(200)])


def epoch(source):
    prompts = []
    with suppress(EndOfData):
        prompts.extend(source.prompt(index) for index in range(10_000))
    return prompts


built_in = pytest.mark.parametrize("name", BUILT_INS)


@built_in
def test_built_in_prompts_are_bare_and_carry_their_answers(opened, tokenizer, name):
    prompt = opened(name, instruction="ignored").prompt(17)
    problem = BUILT_INS[name].task.problem(0, 17, heldout=False)
    assert prompt.id == f"{name}-train-17"
    assert prompt.text == problem.question + "\n" == tokenizer.render(problem.question)
    assert prompt.answer == problem.answer
    assert prompt.token_ids.dtype == np.int32
    assert tokenizer.decode(prompt.token_ids) == prompt.text


@built_in
def test_built_in_held_out_prompts_are_fixed_and_never_trained_on(opened, name):
    heldout = opened(name).heldout(20)
    again = opened(name, seed=5).heldout(8)
    assert [(p.id, p.text) for p in again] == [(p.id, p.text) for p in heldout[:8]]
    assert heldout[3].id == f"{name}-heldout-3"
    assert all(is_heldout(p.text.strip()) for p in heldout)


@built_in
def test_a_built_in_task_has_no_end_and_follows_the_seed(opened, name):
    source = opened(name, epochs=1)
    assert source.prompt(10**6).text == opened(name).prompt(10**6).text
    assert [source.prompt(i).text for i in range(5)] != [
        opened(name, seed=1).prompt(i).text for i in range(5)
    ]


def test_every_epoch_shows_every_training_record_once_in_another_order(opened, train):
    prompts = epoch(opened(train, epochs=2))
    first, second = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    assert len({p.id for p in first}) == len(first)
    assert {p.id for p in first} == {p.id for p in second}
    assert [p.id for p in first] != [p.id for p in second]
    assert [p.id for p in first] != sorted((p.id for p in first), key=lambda i: int(i[6:]))


def test_a_prompt_depends_on_its_index_and_the_seed_alone(opened, train):
    forward = [opened(train).prompt(i) for i in range(400)]
    source = opened(train)

    @settings(deadline=None)
    @given(st.integers(0, 399))
    def same(index):
        assert source.prompt(index).id == forward[index].id
        assert source.prompt(index).text == forward[index].text

    same()
    assert [opened(train, seed=1).prompt(i).id for i in range(9)] != [p.id for p in forward[:9]]


def test_an_id_is_the_file_stem_and_the_record_number(opened, train):
    for prompt in (opened(train).prompt(0), opened(train).heldout(1)[0]):
        number = int(prompt.id.removeprefix("train-"))
        assert prompt.text == f"how much is {number - 1}?\n"


def test_the_end_names_the_epochs_and_is_a_data_error(opened, train):
    source = opened(train, epochs=1)
    num_prompts = len(epoch(source))
    with pytest.raises(EndOfData, match=f"train ended: 1 epochs of {num_prompts} records"):
        source.prompt(num_prompts)
    assert issubclass(EndOfData, DataError)


def test_one_record_in_twenty_is_held_out_and_never_trained_on(opened, train):
    source = opened(train, epochs=1)
    training, heldout = {p.text for p in epoch(source)}, {p.text for p in source.heldout(1000)}
    assert not training & heldout
    assert len(training | heldout) == 200
    assert 1 <= len(heldout) <= 25
    assert [p.id for p in source.heldout(3)] == [p.id for p in opened(train, seed=9).heldout(3)]


def test_held_out_records_of_a_file_of_their_own_are_left_out_of_training(opened, train, tmp_path):
    mine = [f"how much is {i}?" for i in range(20)]
    exam = write(tmp_path / "exam.jsonl", [*mine, "something else?"])
    source = opened(train, epochs=1, eval_path=str(exam))
    heldout = source.heldout(1000)
    assert {p.text for p in heldout} == {f"{q}\n" for q in [*mine, "something else?"]}
    assert all(p.id.startswith("exam-") for p in heldout)
    assert len(epoch(source)) == 180
    assert not {p.text for p in epoch(source)} & {p.text for p in heldout}


def test_a_file_whose_every_question_is_held_out_is_refused(opened, train):
    with pytest.raises(DataError, match="no record left to train on: all 200 are held out"):
        opened(train, eval_path=str(train))


def test_the_instruction_follows_the_question_on_its_own_line(opened, train):
    prompt = opened(train, instruction="Answer in \\boxed{}.").prompt(0)
    assert prompt.text.endswith("?\nAnswer in \\boxed{}.\n")


def test_a_prompt_past_the_limit_raises_alone(opened, tmp_path):
    data = write(tmp_path / "a.jsonl", ["short?", "long " * 100])
    source = opened(data, epochs=1)
    found = []
    for index in range(2):
        try:
            found.append(source.prompt(index).id)
        except DataError as error:
            found.append(str(error))
    assert "a-1" in found
    assert any(
        f.startswith("a-2 has 500 prompt tokens, more than the 100 that data.max_prompt")
        for f in found
    )


def test_held_out_prompts_past_the_limit_are_left_out(opened, train, tmp_path):
    exam = write(tmp_path / "exam.jsonl", ["long " * 100, "short?"])
    assert [p.id for p in opened(train, eval_path=str(exam)).heldout(5)] == ["exam-2"]


def test_skipped_records_of_both_files_are_counted(opened, train, tmp_path):
    train.write_text(train.read_text() + "\n{")
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"question": "q", "answer": "1"}\n[]')
    source = opened(train, eval_path=str(exam))
    assert source.num_skipped == 2
    assert ["train.jsonl record 201" in source.skipped[0], "exam.jsonl" in source.skipped[1]] == [
        True,
        True,
    ]


# ------------------------------------------------------------------ every record once


@pytest.fixture
def in_order(tokenizer):
    def open_with(data, **options):
        section = DataConfig(path=str(data), instruction="")
        options = {"max_prompt_tokens": 60, "vocab_size": tokenizer.vocab_size, **options}
        return FileOrder(section, tokenizer=tokenizer, seed=0, **options)

    return open_with


def test_every_record_comes_once_in_its_order_as_it_would_be_trained_on(in_order, opened, train):
    found = list(in_order(train))
    assert [p.id for p in found] == [f"train-{i}" for i in range(1, 201)]
    trained = {p.id: p.text for p in epoch(opened(train, epochs=1))}
    assert trained == {p.id: p.text for p in found if p.id in trained}
    assert [p.id for p in in_order(train)] == [p.id for p in found], "again and again"


def test_a_record_that_gives_no_prompt_keeps_its_place_with_the_reason(in_order, tmp_path):
    data = write(tmp_path / "a.jsonl", ["short?", "long " * 100, "fine?"])
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], "{", *lines[1:], '{"question": "no answer"}']))
    found = list(in_order(data))
    assert [p.id for p in found] == [f"a-{i}" for i in range(1, 6)]
    assert [isinstance(p, Skipped) for p in found] == [False, True, True, False, True]
    assert found[1].reason.startswith("not valid JSON")
    assert "a-3 has 500 prompt tokens, more than the 60" in found[2].reason


def test_a_token_that_the_model_does_not_have_is_a_reason(in_order, train):
    found = list(islice(in_order(train, vocab_size=20), 3))
    assert all(isinstance(p, Skipped) for p in found)
    assert "vocabulary has 20; the tokenizer is of another model" in found[0].reason


@built_in
def test_the_problems_of_a_built_in_task_come_in_order_without_end(in_order, opened, name):
    found = list(islice(in_order(name), 50))
    assert [p.id for p in found] == [f"{name}-train-{i}" for i in range(50)]
    assert found[17].text == opened(name).prompt(17).text


def test_a_source_that_does_not_exist_is_named(in_order):
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        iter(in_order("gone.jsonl"))
