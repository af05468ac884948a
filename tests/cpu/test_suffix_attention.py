"""Attention of new tokens to their past, judged by plain arithmetic and by SGLang's own backend."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from treepo_async.cpu import environment as cpu

torch = pytest.importorskip("torch")

CLOSE = 1e-5


@pytest.fixture(scope="module")
def attention():
    spec = spec_from_file_location("suffix_attention", cpu.SITE / "suffix_attention.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_attention(query, key, value, scaling):
    """Softmax of all products of one head with what stands no later, for the last tokens."""
    num_new, num_tokens = len(query), len(key)
    rows = []
    for i in range(num_new):
        seen = num_tokens - num_new + i + 1
        weights = torch.softmax(query[i] @ key[:seen].T * scaling, dim=-1)
        rows.append(weights @ value[:seen])
    return torch.stack(rows)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_new_tokens_see_their_past_and_each_other_up_to_themselves(attention, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    num_tokens, num_new = (7, 9, 5, 1), (1, 4, 5, 1)
    keys, values = draw(40, num_kv_heads, 8), draw(40, num_kv_heads, 8)
    places = torch.randperm(40, generator=generator)[: sum(num_tokens)].split(num_tokens)
    query = draw(sum(num_new), 4, 8)

    found = attention.attend(
        query,
        torch.empty_like(query),
        keys,
        values,
        places,
        num_new,
        scaling=0.3,
        enable_gqa=num_kv_heads < 4,
    )

    queries, outputs = query.split(num_new), found.split(num_new)
    for slots, asked, given in zip(places, queries, outputs, strict=True):
        for head in range(4):
            kv_head = head * num_kv_heads // 4
            key, value = keys[slots, kv_head], values[slots, kv_head]
            expected = plain_attention(asked[:, head], key, value, 0.3)
            torch.testing.assert_close(given[:, head], expected, atol=CLOSE, rtol=0)


AGAINST_SGLANG = """
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Theirs
import sglang_attention
sglang_attention.install()
Ours = sglang_attention.SuffixAttention
assert ATTENTION_BACKENDS["torch_native"] is Ours
theirs, ours = Theirs.__new__(Theirs), Ours.__new__(Ours)
calls = []
count = sglang_attention.attend
sglang_attention.attend = lambda *a, **k: calls.append(1) or count(*a, **k)

def draw(*shape):
    return torch.randn(*shape)

def gap(method, query, *rest, **options):
    out = [getattr(b, method)(query, torch.empty_like(query), *rest, **options) for b in (theirs, ours)]
    return (out[0] - out[1]).abs().max().item()

torch.manual_seed(0)
table = torch.randperm(120)[:60].view(3, 20).to(torch.int32)
cache, rows, lens = (draw(120, 2, 8), draw(120, 2, 8)), torch.tensor([2, 0, 1]), torch.tensor([20, 7, 9])
new = torch.tensor([1, 7, 4])
options = dict(scaling=0.3, enable_gqa=True, is_cross_attn=False)
extend = [draw(12, 4, 8), *cache, table, rows, lens, lens - new, new, None]
decode = [draw(3, 4, 8), *cache, table, rows, lens, None]
names = "_run_sdpa_forward_extend", "_run_sdpa_forward_decode"
print(gap(names[0], *extend, causal=True, sliding_window_size=None, **options), len(calls))
print(gap(names[1], *decode, causal=False, sliding_window_size=None, **options), len(calls))
print(gap(names[0], *extend, causal=True, sliding_window_size=3, **options), len(calls))
print(gap(names[1], *decode, causal=False, sliding_window_size=3, **options), len(calls))
print(gap(names[0], *extend, causal=False, sliding_window_size=None, **options), len(calls))
"""


@pytest.mark.engine
def test_sglang_gets_the_numbers_of_its_own_backend_and_keeps_what_it_alone_knows(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AGAINST_SGLANG],
        env={"PATH": os.environ["PATH"], **cpu.environment(False, inherited={})},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=55,
    )

    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[-5:]]
    assert all(float(gap) < CLOSE for gap, _ in lines)
    assert [int(num_calls) for _, num_calls in lines] == [1, 2, 2, 2, 2]
