"""Dry runs without weights, network or GPU: of every config that is shipped, and of inputs that are partly there."""

import json

import pytest

from tests.fakes import MODEL
from treepo_async.cluster.dry_run import dry_run
from treepo_async.cluster.model_files import find_files, has_tokenizer
from treepo_async.config.command_line import CONFIG_DIR, parse
from treepo_async.errors import ConfigError, DataError
from treepo_async.tiny.tokenizer import save_tokenizer

PAPER = "treepo_qwen2.5_7b"
ON_TOP_OF_PAPER = ("segments_7x1024", "segments_28x256")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub, and nothing of it in a cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "problems.jsonl"
    lines = [json.dumps({"question": f"{i}+{i}", "answer": str(2 * i)}) for i in range(30)]
    file.write_text("\n".join(lines))
    return f"data={file}"


@pytest.fixture
def model_dir(tmp_path):
    """A model without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder, max_tokens=512)
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def dry(*words, gpu_gib=None, nodes=None):
    return dry_run(parse(list(words)), gpu_gib=gpu_gib, report=lambda *_: None, nodes=nodes)


@pytest.mark.parametrize("file", sorted(CONFIG_DIR.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_has_a_plan_that_fits(file, data, model_dir, tmp_path):
    words = [f"config={file.stem}", f"run_dir={tmp_path / 'run'}"]
    if file.stem in ON_TOP_OF_PAPER:
        words.insert(0, f"config={PAPER}")
    elif "model:" not in file.read_text():
        words += [f"model={model_dir}", data, "data.instruction=''"]
    elif "path: " not in file.read_text().partition("data:")[2].partition("tree:")[0]:
        words.append(data)
    text = dry(*words, gpu_gib=80)
    assert "for ranks" in text
    assert "warning" not in text
    assert not (tmp_path / "run").exists()


def test_the_paper_is_planned_with_what_is_shipped_alone():
    text = dry(f"config={PAPER}")
    assert f"Qwen/Qwen2.5-7B at {CONFIG_DIR / 'models' / 'Qwen' / 'Qwen2.5-7B'}" in text
    assert "16 leaves, segments of 512 x depth 14, responses up to 7168 tokens" in text
    assert "512 trees x 16 leaves = 8192 trajectories a step, 300 steps" in text
    assert "16 updates a step of 32 trees" in text
    assert "7.616B parameters, bfloat16" in text
    assert "16 GPUs: 8 for ranks, 8 for engines" in text


@pytest.mark.parametrize("name", ON_TOP_OF_PAPER)
def test_other_segments_leave_the_response_as_long(name):
    segments, size = name.removeprefix("segments_").split("x")
    text = dry(f"config={PAPER}", f"config={name}")
    assert f"segments of {size} x depth {segments}, responses up to 7168 tokens" in text


def test_smaller_gpus_than_the_paper_needs_are_warned_of():
    text = dry(f"config={PAPER}", "learner=tp4", gpu_gib=24)
    assert "a rank of stage 0 needs about" in text


def test_a_folder_without_weights_will_do_and_gives_a_prompt(model_dir, data):
    text = dry(f"model={model_dir}", data, "data.instruction=''")
    assert f"{model_dir} at {model_dir}" in text
    assert "tokens), e.g. problems-" in text


def test_without_a_tokenizer_the_records_are_read_all_the_same(data, tmp_path):
    text = dry("config=gsm8k", data)
    assert "'0+0' (no tokenizer here), first of 30" in text
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "no question"}\n')
    with pytest.raises(DataError, match="no usable record"):
        dry("config=gsm8k", f"data={bad}")
    with pytest.raises(ConfigError, match=r"missing\.jsonl does not exist"):
        dry("config=gsm8k", "data=missing.jsonl")
    with pytest.raises(ConfigError, match="is not read"):
        dry("config=gsm8k", "data=missing.csv")


def test_a_scorer_that_does_not_exist_is_refused_without_a_tokenizer_too():
    with pytest.raises(ConfigError, match="did you mean"):
        dry(f"config={PAPER}", "reward.scorer=mth")


def test_a_model_that_nobody_has_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)model.path=owner/Other: its config.json cannot"):
        dry("model=owner/Other", "data=p.jsonl")


def test_a_shipped_config_is_no_model_to_export_with(tmp_path):
    words = {"cache_dir": tmp_path, "seed": 0, "report": lambda *_: None}
    shipped = find_files("Qwen/Qwen2.5-7B", shipped=True, **words)
    assert not has_tokenizer(shipped)
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        find_files("Qwen/Qwen2.5-7B", **words)


def test_a_shipped_config_is_of_its_owners_model_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"me/Qwen2\.5-7B: its config\.json cannot be"):
        find_files(
            "me/Qwen2.5-7B", cache_dir=tmp_path, seed=0, report=lambda *_: None, shipped=True
        )


def test_a_model_in_the_hubs_cache_comes_before_the_shipped_config(tmp_path, data):
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    save_tokenizer(snapshot, max_tokens=512)
    (snapshot / "config.json").write_text(json.dumps(MODEL))
    found = find_files(
        "Qwen/Qwen2.5-7B", cache_dir=tmp_path, seed=0, report=lambda *_: None, shipped=True
    )
    assert found == snapshot


def test_a_plan_for_described_nodes_shows_who_is_where_and_what_of_a_gpu_they_take():
    words = [f"config={PAPER}", "actors=32", "engines=12", "engine.tp=2", "learner=tp4pp2"]
    text = dry(*words, nodes="4x8")
    assert "4 with 32 GPUs: 8 for the learner (tp4pp2), 24 for 12 engines, 0 free" in text
    assert "node-0   GPU 0-3  rank 0-3  tp 0-3  stage 0 of 2  21.4 of 80 GiB each" in text
    assert "32 GPUs: 8 for ranks, 24 for engines" in text
    assert text.count("  engine-") == 12
    assert "cluster.keys_dir" in text


def test_a_plan_that_has_no_room_on_described_nodes_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"engines=20 engine\.tp=2 need 40 GPUs"):
        dry(f"config={PAPER}", "engines=20", "engine.tp=2", "learner=tp4pp2", nodes="4x8")


def test_an_existing_cluster_is_not_asked_by_a_dry_run(model_dir, data):
    text = dry(f"model={model_dir}", data, "data.instruction=''", "cluster.ray_address=head:6379")
    assert "head:6379 is not asked; describe them: --nodes=4x8" in text


def test_an_engine_that_is_split_needs_gpus_also_in_a_plan(model_dir, data, monkeypatch):
    monkeypatch.setattr("treepo_async.cluster.dry_run.cuda_present", lambda: False)
    words = [f"model={model_dir}", data, "data.instruction=''", "engine.tp=2"]
    with pytest.raises(ConfigError, match=r"engine\.tp=2 splits an engine over GPUs"):
        dry(*words)
    with pytest.raises(ConfigError, match=r"engine\.tp=2 splits an engine over GPUs"):
        dry(*words, nodes="1x0x16")
    for more in ({"gpu_gib": 80}, {"nodes": "1x8"}):
        assert "3 GPUs: 1 for ranks, 2 for engines" in dry(*words, **more)
    assert "1 engine" in dry(*words, "engine.url=http://10.0.0.1:30000")
