import pytest

from tests.fakes import MODEL
from treepo_async.cluster.forecast import Device, Forecast, choose_device, parse_gpu_gib
from treepo_async.cluster.forecast_text import describe
from treepo_async.cluster.forecast_warnings import warnings_of
from treepo_async.cluster.memory import GIB
from treepo_async.config.command_line import parse
from treepo_async.errors import ConfigError

ROOMY = "learner.microbatch_tokens=8192"
GPU, CPU = Device(80 * GIB, 24 * GIB), Device(None, 24 * GIB)
LARGE = MODEL | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "max_position_embeddings": 32768,
}


def forecast_of(*words, model=MODEL):
    return Forecast.of(parse(list(words)), model)


def warned(forecast, device):
    """Warnings, without the one that every run with engines on GPUs has."""
    return warnings_of(forecast, device)


def rows(text):
    """First lines by name."""
    return {line[2:10].strip(): line[11:] for line in text.splitlines() if line[2:10].strip()}


def test_a_step_is_told_in_updates_lengths_microbatches_and_trees_ahead():
    words = ["learner.minibatches=4", "learner=dp2", "replay.max_staleness=2", "actors=3"]
    found = rows(describe(forecast_of(*words), CPU))
    assert found["update"].startswith("4 updates a step of 4 trees, dealt to 2 replicas; loss ppo")
    # 512 positions, of which two are spare
    assert found["lengths"] == (
        "prompts up to 440 tokens, responses up to 70, paths up to 510; a step at most 24,960 tokens"
    )
    assert found["packing"].startswith("4096 tokens a microbatch = 8.0 longest paths")
    assert found["ahead"] == (
        "at most 48 trees begun and not trained = (staleness 2 + 1) x 16; actors grow 24 at once"
    )


def test_every_stage_and_the_engine_have_their_memory():
    text = describe(forecast_of("learner=tp2pp2dp2", "engines=2"), GPU)
    assert "0 (embedding)" in text
    assert "1 (head)" in text
    assert "10 GPUs: 8 for ranks, 2 for engines" in text
    assert "KV cache 1 KiB a token" in text
    assert "0 (embedding, head)" in describe(forecast_of(), GPU)


def test_on_cpu_the_sum_of_all_processes_is_told():
    forecast = forecast_of("learner=tp2", "actors=4")
    assert f"all processes {forecast.needed_on_cpu() / GIB:.1f} of 24.0" in describe(forecast, CPU)
    assert "GPU" not in describe(forecast, CPU)
    assert forecast.needed_on_cpu() > forecast_of("learner=tp1", "actors=4").needed_on_cpu()
    assert forecast.needed_on_cpu() > forecast_of("learner=tp2", "actors=2").needed_on_cpu()


def test_trees_from_a_file_need_neither_engine_nor_leases():
    text = describe(forecast_of("data.trees=t.jsonl", "eval.every=0"), GPU)
    assert "an engine" not in text
    assert "ahead" not in rows(text)
    assert "1 GPUs: 1 for ranks, 0 for engines" in text
    assert rows(text)["lengths"] == "as t.jsonl has them"
    assert rows(text)["packing"].startswith("4096 tokens a microbatch, recompute none")
    assert "warning" not in text


def test_trees_from_a_file_are_not_forecast_from_how_trees_would_be_grown():
    words = ["data.trees=t.jsonl", "eval.every=0", "learner.microbatch_tokens=100"]
    assert warned(forecast_of(*words), GPU) == []
    assert len(warned(forecast_of(*words[2:]), GPU)) == 2
    totals = [forecast_of(*w).ranks(on_gpu=True)[0].total for w in (words, words[2:])]
    assert totals[0] < totals[1]


def test_an_engine_on_several_gpus_divides_weights_and_cache_over_them():
    one, two = (forecast_of(f"engine.tp={tp}").engine(80 * GIB) for tp in (1, 2))
    assert two.weights == one.weights // 2
    assert two.kv_bytes_per_token == one.kv_bytes_per_token // 2
    assert "3 GPUs: 1 for ranks, 2 for engines" in describe(forecast_of("engine.tp=2"), GPU)


def test_the_default_run_has_nothing_to_warn_of():
    assert warned(forecast_of(), CPU) == []
    assert "warning" not in describe(forecast_of(), CPU)


def test_small_microbatches_are_warned_of_unless_nothing_is_shared():
    # the longest path has 510 tokens
    assert warned(forecast_of("learner.microbatch_tokens=2040"), CPU) == []
    (warning,) = warned(forecast_of("learner.microbatch_tokens=2039"), CPU)
    assert "learner.microbatch_tokens=2039 is less than 4 x 510" in warning
    assert warned(forecast_of("learner.microbatch_tokens=2039", "learner.packing=flat"), CPU) == []
    first, _ = warned(forecast_of("learner.microbatch_tokens=509"), CPU)
    assert "less than one path of 510 tokens" in first


def test_memory_is_estimated_for_a_path_where_it_is_longer_than_a_microbatch():
    small, exact, large = (
        forecast_of(f"learner.microbatch_tokens={tokens}").ranks(on_gpu=True)[0].total
        for tokens in (100, 510, 1000)
    )
    assert small == exact < large


def test_a_rank_that_does_not_fit_is_warned_of_with_the_way_out():
    words = ["model=Qwen/Qwen2.5-7B", "data=p.jsonl", "model.dtype=bfloat16", ROOMY]
    (warning,) = warned(forecast_of(*words, model=LARGE), GPU)
    assert "a rank of stage 0 needs about" in warning
    assert "a GPU has 80; most of it is for optimizer: give learner.layout a larger tp" in warning
    assert warned(forecast_of(*words, "learner=tp4pp2", model=LARGE), GPU) == []
    long = forecast_of(*words, "learner=tp4pp2", "learner.microbatch_tokens=900000", model=LARGE)
    (warning,) = warned(long, GPU)
    assert "lower learner.microbatch_tokens, or give learner.recompute=full" in warning


def test_an_engine_without_room_for_its_cache_is_warned_of():
    words = ["model=m", "data=p.jsonl", "model.dtype=bfloat16", "learner=tp4pp2", ROOMY]
    warnings = warned(forecast_of(*words, model=LARGE), Device(16 * GIB, 24 * GIB))
    assert any("an engine has room for 0 tokens" in warning for warning in warnings)
    (warning,) = warned(forecast_of(*words, "engine.max_total_tokens=9000000", model=LARGE), GPU)
    assert "engine.max_total_tokens is 9,000,000" in warning
    assert warned(forecast_of(*words, "engine.max_total_tokens=null", model=LARGE), GPU) == []


def test_more_than_this_machine_has_is_warned_of_on_cpu():
    forecast = forecast_of("model=m", "data=p.jsonl", ROOMY, model=LARGE)
    assert "this machine has 24.0" in warned(forecast, CPU)[0]
    assert warned(forecast, Device(None, 10**15)) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["learner=tp3"], "num_attention_heads is 4, not a multiple of the learner's tp=3"),
        (["learner=pp4"], "num_hidden_layers is 2, not a multiple of the learner's pp=4"),
        (["engine.max_total_tokens=500"], "cannot hold one context of 512 tokens"),
        (["engine.context_length=600"], "is above the model's 512 positions"),
        (["tree.max_depth=52"], "leave no room for a prompt in 512 tokens of context"),
    ],
)
def test_what_cannot_work_is_refused_with_its_numbers(words, reason):
    with pytest.raises(ConfigError, match=reason):
        forecast_of(*words)


def test_the_estimate_is_for_gpus_where_they_are_meant():
    sizes = {"needed": GIB, "ram_bytes": 2 * GIB}
    assert choose_device(None, has_cuda=False, **sizes).gpu_bytes is None
    assert choose_device(None, has_cuda=True, **sizes).gpu_bytes == 80 * GIB
    assert choose_device(24, has_cuda=False, **sizes).gpu_bytes == 24 * GIB
    too_large = choose_device(None, has_cuda=False, needed=3 * GIB, ram_bytes=2 * GIB)
    assert too_large.gpu_bytes == 80 * GIB


def test_the_memory_of_a_gpu_is_a_number():
    assert parse_gpu_gib("141") == 141
    for text in ("", "80GB", "0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"--gpu-gib={text} is no memory"):
            parse_gpu_gib(text)
