"""`launch/actor.py` as a person starts it, with a fake SGLang behind `engine.url`: files, messages, exit codes, signals."""

import asyncio
import contextlib
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.actor import generate
from tests.fakes import MODEL, FakeSGLang, until
from treepo_async.config.command_line import parse_generation
from treepo_async.config.schema import GenerateConfig, knobs
from treepo_async.errors import ConfigError
from treepo_async.tiny.tokenizer import build_tokenizer, save_tokenizer
from treepo_async.wire.tree_file import TreeFile

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 20
VOCAB_SIZE = 384
SMALL = ("tree.width=4", "tree.segment_tokens=4", "tree.max_depth=3", "data.instruction=''")
RUN_S = 40


class Launched:
    """A start of the program, with what it said."""

    def __init__(self, process):
        self.process = process
        self.out = self.err = ""

    async def end(self):
        out, err = await asyncio.to_thread(self.process.communicate, timeout=RUN_S)
        self.out, self.err = out, err
        return self.process.returncode


def start(*words, cwd=ROOT):
    return Launched(
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "actor.py"), *map(str, words)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


async def launched(*words, cwd=ROOT):
    run = start(*words, cwd=cwd)
    await run.end()
    return run


@pytest.fixture
def inputs(tmp_path):
    """A model folder without weights and a data file of one's own, as words."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder, 256)
    config = MODEL | {"max_position_embeddings": 64, "vocab_size": VOCAB_SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    data = tmp_path / "sums.jsonl"
    lines = [json.dumps({"question": f"{i}+{i}", "answer": str(2 * i)}) for i in range(NUM_PROMPTS)]
    data.write_text("\n".join(lines) + "\n")
    return [f"model={folder}", f"data={data}", *SMALL]


@contextlib.asynccontextmanager
async def sglang(**options):
    async with FakeSGLang(vocab_size=VOCAB_SIZE, version="default", **options) as fake:
        yield fake


def ids_in(path):
    file = TreeFile(path)
    return [file.tree(i).prompt.id for i in range(len(file))]


ALL = [f"sums-{i}" for i in range(1, NUM_PROMPTS + 1)]


# ------------------------------------------------------------------ what a person gets


def test_help_names_every_key_and_imports_nothing_heavy():
    code = (
        "import sys; sys.path.insert(0, '.'); from launch.actor import main; code = main(['--help']);"
        "heavy = {'torch', 'ray', 'sglang', 'megatron', 'transformers', 'zmq'} & set(sys.modules);"
        "print('heavy:', sorted(heavy), 'code:', code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=RUN_S
    )
    *text, last = done.stdout.splitlines()
    assert last == "heavy: [] code: 0"
    for key, _ in knobs(GenerateConfig):
        assert any(line.startswith(f"  {key}=") for line in text), key


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "out is not set"),
        (["out=o.txt", "limit=1"], r"out=o.txt must end in .jsonl or .parquet"),
        (["out=o.jsonl"], "data=tiny has no end; give limit=N"),
        (["otu=o.jsonl"], "unknown key otu; did you mean out?"),
        (["out=o.jsonl", "learner=tp4"], "learner is a key of training"),
        (["out=o.jsonl", "limit=1", "engine.url=nowhere"], "engine.url=nowhere is no http://"),
        (["out=o.jsonl", "model=m", "data=d.jsonl"], "model.path=m is no folder"),
    ],
    ids=["nothing", "suffix", "endless", "typo", "training", "url", "model"],
)
async def test_a_bad_command_line_ends_with_2_and_the_way_out_and_leaves_nothing(
    tmp_path, words, reason
):
    done = await launched(*words, cwd=tmp_path)
    assert done.process.returncode == 2
    assert reason in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", r"sums.jsonl is empty; give a source with records"),
        ("{\n[]\n", "no usable record (2 skipped): sums-1: not valid JSON"),
        (
            '{"question": "' + "1" * 200 + '", "answer": "1"}\n',
            "(1 skipped): sums-1: sums-1 has 101 prompt tokens, more than the 50",
        ),
        ('{"text": "1", "answer": "1"}\n', "set data.prompt_field to one of them"),
    ],
    ids=["empty", "broken", "long", "fields"],
)
async def test_data_without_a_prompt_ends_with_2_and_the_reason(inputs, tmp_path, content, reason):
    (tmp_path / "sums.jsonl").write_text(content)
    done = await launched(*inputs, f"out={tmp_path}/o.jsonl")
    assert done.process.returncode == 2
    assert reason in done.err
    assert not (tmp_path / "o.jsonl").exists()


async def test_an_engine_that_is_not_there_or_does_not_fit_ends_with_2(inputs, tmp_path):
    out = f"out={tmp_path}/o.jsonl"
    done = await launched(*inputs, out, "engine.url=http://127.0.0.1:9")
    assert done.process.returncode == 2
    assert "error: engine.url=http://127.0.0.1:9: /model_info got no answer" in done.err
    async with FakeSGLang() as fake:
        done = await launched(*inputs, out, f"engine.url={fake.url}")
    assert done.process.returncode == 2
    assert "its vocabulary has 128 tokens, that of model.path 384" in done.err


async def test_data_is_never_overwritten_by_its_own_trees(inputs, tmp_path):
    data, problems = tmp_path / "sums.jsonl", (tmp_path / "sums.jsonl").read_bytes()
    done = await launched(*inputs, f"out={tmp_path}/./sums.jsonl", "overwrite=true")
    assert done.process.returncode == 2
    assert f"error: data={data} is {data}, which out={data} writes; name another out" in done.err
    assert data.read_bytes() == problems
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "sums.jsonl"]


async def test_a_file_that_cannot_be_opened_is_named_and_there_is_no_traceback(inputs, tmp_path):
    name = "n" * 250 + ".jsonl"
    done = await launched(*inputs, f"out={tmp_path}/{name}")
    assert done.process.returncode == 2
    assert f"error: {tmp_path}/" in done.err
    assert "File name too long" in done.err
    assert "Traceback" not in done.err


# ------------------------------------------------------------------ a whole job


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
async def test_every_prompt_of_a_file_gets_its_tree_once(inputs, tmp_path, suffix):
    out = tmp_path / f"o{suffix}"
    async with sglang() as fake:
        done = await launched(*inputs, f"out={out}", f"engine.url={fake.url}")
    assert done.process.returncode == 0, done.err
    assert sorted(ids_in(out)) == sorted(ALL)
    text = done.out
    assert f"{NUM_PROMPTS} done, 0 skipped, 0 failed of {NUM_PROMPTS}" in text
    assert f"{NUM_PROMPTS} trees, {4 * NUM_PROMPTS} trajectories" in text
    assert text.splitlines()[-1] == f"done; {out}"
    assert done.err == ""
    left = sorted(file.name for file in tmp_path.iterdir())
    own = [f".{out.name}.lock", out.name, f"{out.name}.job.json"]
    assert left == sorted(["model", "sums.jsonl", *own])


async def test_several_servers_share_the_work_and_one_that_goes_away_costs_no_prompt(
    inputs, tmp_path
):
    out = tmp_path / "trees.jsonl"
    async with sglang() as one, sglang(latency_s=0.05) as two:

        async def leave():
            await until(lambda: two.running, timeout_s=RUN_S)
            await two.__aexit__()

        leaving = asyncio.ensure_future(leave())
        done = await launched(*inputs, f"out={out}", f"engine.url={one.url},{two.url}")
        await leaving
        assert done.process.returncode == 0, done.err
        assert min(len(server.bodies("/generate")) for server in (one, two)) > 0
    assert sorted(ids_in(out)) == sorted(ALL)


async def test_trajectories_are_flat_lines_with_text_and_scores(inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    async with sglang() as fake:
        words = (f"out={out}", f"engine.url={fake.url}", "out_form=trajectories", "limit=3")
        done = await launched(*inputs, *words, "reward.scorer=tests.launch.scorers:length")
    assert done.process.returncode == 0, done.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["leaf"] for line in lines] == [0, 1, 2, 3] * 3
    for line in lines:
        assert line["response"]
        assert len(line["token_ids"]) == len(line["logprobs"]) == 12
        assert line["accuracy"] == min(1.0, len(line["response"]) / 100)
        assert line["stop"] == "length"


async def test_what_is_there_is_not_grown_again_and_another_job_is_refused(inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    async with sglang() as fake:
        words = (*inputs, f"out={out}", f"engine.url={fake.url}")
        await launched(*words, "limit=5")
        before = out.read_bytes()
        again = await launched(*words, "limit=8")
        assert again.process.returncode == 0
        assert "8 done" in again.out
        assert out.read_bytes().startswith(before)
        assert sorted(ids_in(out)) == sorted(ALL[:8])
        num_calls = len(fake.calls)
        assert (await launched(*words, "limit=8")).process.returncode == 0
        assert len(fake.calls) == num_calls, "nothing was left to do, so no engine was needed"
        other = await launched(*words, "limit=8", "tree.width=3")
        assert other.process.returncode == 2
        assert "holds another job: tree.width=3 was 4" in other.err
        fake.level = 2.0
        weights = await launched(*words, "limit=9")
        assert weights.process.returncode == 2
        assert "weights: level 2.0 was level 0.0" in weights.err
        anew = await launched(*words, "limit=2", "tree.width=3", "overwrite=true")
        assert anew.process.returncode == 0
    assert sorted(ids_in(out)) == sorted(ALL[:2])


async def test_with_a_lower_limit_only_prompts_below_it_count(inputs, tmp_path):
    out, data = tmp_path / "o.jsonl", tmp_path / "sums.jsonl"
    async with sglang() as fake:
        words = (*inputs, f"out={out}", f"engine.url={fake.url}", "concurrent_trees=1")
        await launched(*words, "limit=4")
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(line for line in lines if b'"sums-1"' not in line))
        done = await launched(*words, "limit=2")
    assert done.process.returncode == 0, done.err
    assert data.exists()
    assert "2 prompts, 1 left" in done.out
    assert "2 done, 0 skipped, 0 failed of 2" in done.out
    assert sorted(ids_in(out)) == sorted(ALL[:4])


@pytest.mark.parametrize("redirection", [">&-", "| head -n 1", ">/dev/full"])
async def test_the_work_goes_on_when_nobody_reads_what_is_said(inputs, tmp_path, redirection):
    out = tmp_path / "o.jsonl"
    async with sglang() as fake:
        words = [*inputs, f"out={out}", f"engine.url={fake.url}", "limit=4"]
        command = shlex.join([sys.executable, str(ROOT / "launch" / "actor.py"), *words])
        code = f"set -o pipefail; {command} {redirection}"
        done = await asyncio.to_thread(
            subprocess.run, ["bash", "-c", code], cwd=ROOT, capture_output=True, timeout=RUN_S
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(ids_in(out)) == ALL[:4]


async def test_a_file_that_fails_on_the_way_ends_it_with_1_and_how_to_go_on(inputs, tmp_path):
    out = tmp_path / "o.parquet"
    async with sglang(latency_s=0.05) as fake:
        run = start(*inputs, f"out={out}", f"engine.url={fake.url}", "limit=6")
        await until((tmp_path / "o.parquet.unfinished.jsonl").exists, timeout_s=RUN_S)
        (tmp_path / ".o.parquet.tmp").mkdir()
        code = await run.end()
    assert code == 1
    assert f"error: {tmp_path}/.o.parquet.tmp: Is a directory" in run.err
    assert "Traceback" not in run.err
    assert run.out.splitlines()[-1].startswith("failed; ")
    assert "go on with: python launch/actor.py" in run.out


async def test_bad_records_rewards_and_prompts_end_with_a_reason_and_nothing_is_lost(
    inputs, tmp_path
):
    data = tmp_path / "sums.jsonl"
    lines = data.read_text().splitlines()[:6]
    lines[1] = '{"question": "1+1", "ans'
    lines[2] = json.dumps({"question": "9" * 200, "answer": "1"})
    lines[3] = json.dumps({"question": "&+&", "answer": "raise"})
    lines[4] = json.dumps({"question": "@+@", "answer": "hang"})
    data.write_text("\n".join(lines) + "\n")
    out = tmp_path / "o.jsonl"
    async with sglang() as fake:
        words = (f"out={out}", f"engine.url={fake.url}", "reward.timeout_s=0.5")
        done = await launched(*inputs, *words, "reward.scorer=tests.launch.scorers:moody")
    assert done.process.returncode == 0, done.err
    assert "4 done, 2 skipped, 0 failed of 6" in done.out
    assert "errors 8 (" in done.out
    assert sorted(ids_in(out)) == ["sums-1", "sums-4", "sums-5", "sums-6"]
    scored = {json.loads(line)["prompt_id"]: json.loads(line)["rewards"] for line in out.open()}
    assert scored["sums-4"] == scored["sums-5"] == [None] * 4
    assert None not in scored["sums-1"]
    reasons = [json.loads(line) for line in (tmp_path / "o.jsonl.failed.jsonl").open()]
    assert {r["prompt_id"]: r["outcome"] for r in reasons} == dict.fromkeys(
        ("sums-2", "sums-3"), "skipped"
    )
    assert done.out.splitlines()[-1] == f"done; {out}; without a tree: {out}.failed.jsonl"


async def test_a_prompt_that_kills_the_engine_is_named_with_its_reason_and_all_others_have_trees(
    inputs, tmp_path
):
    data, out = tmp_path / "sums.jsonl", tmp_path / "o.jsonl"
    lines = data.read_text().splitlines()[:5]
    lines[2] = json.dumps({"question": "~+~", "answer": "1"})
    data.write_text("\n".join(lines) + "\n")
    async with sglang(dies_of=build_tokenizer().token_to_id("~"), latency_s=0.02) as fake:
        # whoever runs the server brings it back when it has been missed a second time
        fake.on_death = lambda: setattr(fake, "num_missed", 2)
        words = (f"out={out}", f"engine.url={fake.url}", "concurrent_trees=2")
        done = await launched(*inputs, *words)
    assert done.process.returncode == 0, done.err
    assert "4 done, 0 skipped, 1 failed of 5" in done.out
    assert done.out.count("engine away: ") == 3, done.out
    assert sorted(ids_in(out)) == ["sums-1", "sums-2", "sums-4", "sums-5"]
    (ending,) = map(json.loads, (tmp_path / "o.jsonl.failed.jsonl").open())
    assert (ending["prompt_id"], ending["outcome"]) == ("sums-3", "failed")
    assert ending["reason"].startswith("3 attempts, the last: EngineDiedError: the engine died")
    assert done.out.splitlines()[-1] == f"done; {out}; without a tree: {out}.failed.jsonl"


# ------------------------------------------------------------------ the end of a start


async def test_a_signal_ends_it_in_order_and_the_same_command_goes_on(inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    async with sglang(latency_s=0.03) as fake:
        words = (*inputs, f"out={out}", f"engine.url={fake.url}", "concurrent_trees=2")
        for number in (signal.SIGINT, signal.SIGTERM):
            run = start(*words)
            done = len(ids_in(out)) if out.exists() else 0
            await until(
                lambda n=done: out.exists() and out.read_bytes().count(b"\n") >= n + 3,
                timeout_s=RUN_S,
            )
            run.process.send_signal(number)
            assert await run.end() == 130, run.err
            assert f"{number.name}: stopping; once more to stop at once" in run.out
            last = run.out.splitlines()[-1]
            assert last.startswith(f"stopped; {out}; go on with: python launch/actor.py model=")
            assert run.err == ""
            assert not fake.running, "no request is left in the engine"
        again = await launched(*words)
        assert again.process.returncode == 0
    assert sorted(ids_in(out)) == sorted(ALL)


@pytest.mark.parametrize("form", ["trees", "trajectories"])
async def test_kills_lose_no_finished_prompt_and_repeat_none(inputs, tmp_path, form):
    out = tmp_path / "o.parquet"
    lines = tmp_path / "o.parquet.unfinished.jsonl"
    async with sglang(latency_s=0.03) as fake:
        words = (*inputs, f"out={out}", f"engine.url={fake.url}", f"out_form={form}")
        for _ in range(3):
            size = lines.stat().st_size if lines.exists() else 0
            run = start(*words, "concurrent_trees=2")
            await until(lambda n=size: lines.exists() and lines.stat().st_size > n, timeout_s=RUN_S)
            run.process.kill()
            assert await run.end() == -signal.SIGKILL
            with lines.open("ab") as file:
                file.write(b'{"torn')
        done = await launched(*words)
        assert done.process.returncode == 0, done.err
        assert "cut off 6 bytes" in done.out
    from pyarrow.parquet import read_table

    found = read_table(out).column("prompt_id").to_pylist()
    assert sorted(found) == sorted(ALL * (1 if form == "trees" else 4))
    assert not lines.exists()


async def test_two_actors_do_not_write_one_file(inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    async with sglang(latency_s=60.0) as fake:
        words = (*inputs, f"out={out}", f"engine.url={fake.url}")
        run = start(*words)
        await until(out.exists, timeout_s=RUN_S)
        second = await launched(*words)
        assert second.process.returncode == 2
        assert "is being written by another actor" in second.err
        run.process.terminate()
        await run.end()


async def test_an_engine_that_stays_away_ends_it_with_1_and_how_to_go_on(inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    async with sglang(latency_s=0.05) as fake:
        run = start(*inputs, f"out={out}", f"engine.url={fake.url}", "engine.start_timeout_s=0.5")
        await until(lambda: out.exists() and out.stat().st_size > 0, timeout_s=RUN_S)
    assert await run.end() == 1
    assert "stayed away for 0.5 s (engine.start_timeout_s)" in run.err
    assert "Traceback" not in run.err
    assert run.out.splitlines()[-1].startswith(f"failed; {out}; go on with: python launch/actor.py")


def test_an_engine_that_is_split_needs_gpus(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("treepo_async.cpu.environment.cuda_present", lambda: False)
    words = [*map(str, inputs), f"out={tmp_path / 'o.jsonl'}", "engine.tp=2"]
    with pytest.raises(ConfigError, match=r"engine\.tp=2 splits an engine over GPUs"):
        generate(parse_generation(words), words)
    assert not (tmp_path / "o.jsonl").exists()
