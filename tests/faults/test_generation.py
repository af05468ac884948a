"""The command that kills the stand-alone actor on its way through a file, on a fake engine."""

import asyncio
import json

import pytest

from tests.fakes import MODEL, FakeSGLang, until
from tests.faults.generation import main
from tests.faults.job import Job, JobError
from treepo_async.tiny.tokenizer import save_tokenizer

NUM_PROMPTS = 16
HALF = NUM_PROMPTS // 2
RUN_S = 60.0

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
def words(tmp_path):
    """A file in which one record is too long and two are beyond the limit, and a model folder without weights."""
    model = tmp_path / "model"
    model.mkdir()
    save_tokenizer(model, 64)
    (model / "config.json").write_text(json.dumps({**MODEL, "max_position_embeddings": 64}))
    questions = [f"{i}+{i}" for i in range(NUM_PROMPTS + 2)]
    questions[3] = "1" * 200
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    return [
        f"data={data}",
        f"model={model}",
        "data.instruction=''",
        "concurrent_trees=2",
        f"limit={NUM_PROMPTS}",
    ]


async def hold_until_killed(fake, out):
    """Let no tree be finished from the half on, until the next start asks for the engine's vocabulary."""
    # a tree fewer: a record that is skipped has ended too
    await until(lambda: out.exists() and out.read_bytes().count(b"\n") >= HALF - 1, timeout_s=RUN_S)
    fake.latency_s = RUN_S
    asked = num_asked(fake)
    await until(lambda: num_asked(fake) > asked, timeout_s=RUN_S)
    fake.latency_s = 0.0


def num_asked(fake):
    """Requests for the log-prob of a token, which no tree needs."""
    return sum("token_ids_logprob" in body for body in fake.bodies("/generate"))


async def test_a_job_that_is_killed_ends_whole_and_the_command_says_what_it_came_to(
    words, tmp_path, capsys
):
    async with FakeSGLang(
        vocab_size=MODEL["vocab_size"], version="default", latency_s=0.02
    ) as fake:
        given = [*words, f"engine.url={fake.url}", f"out={tmp_path}/job", "kills=1"]
        code, _ = await asyncio.gather(
            asyncio.to_thread(main, given), hold_until_killed(fake, tmp_path / "job/trees.jsonl")
        )
    rows = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line]
    table = dict(row for row in rows if len(row) == 2)
    assert code == 0, rows
    assert (table["prompts"], table["trees"]) == ("16", "15")
    assert (table["skipped"], table["failed"]) == ("1", "0")
    killed_at = int(table["kills"].removeprefix("1, after ").removesuffix(" prompts"))
    assert HALF <= killed_at < NUM_PROMPTS


def test_a_start_that_ends_by_itself_is_told_with_what_it_said(tmp_path):
    job = Job(tmp_path / "o.jsonl", ["data=tiny"])
    with pytest.raises(JobError, match=r"ended after 0 of 1 prompts: error: data=tiny has no end"):
        job.start().wait_for(1)


def test_words_that_it_does_not_know_what_to_do_with_end_it_with_its_help(capsys):
    assert main(["kills=3"]) == 2
    assert "python -m tests.faults.generation data=FILE" in capsys.readouterr().out
