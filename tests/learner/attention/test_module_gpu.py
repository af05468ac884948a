"""FlexAttention on CUDA against the textbook in float64."""

import numpy as np
import pytest
import torch

from tests.learner.forests import gradients, tensors, textbook
from treepo_async.bench.forests import random_end
from treepo_async.learner.attention.dense import visibility
from treepo_async.learner.attention.plan import alignment, planner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.timeout(300),
]
SCALE = 0.125


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("num_tokens", [1, 130, 1000, 1024, 4000])
@pytest.mark.parametrize("segment", [1, 40, 2048])
def test_flex_gives_the_textbook_output_and_gradients(dtype, tolerance, num_tokens, segment):
    rng = np.random.default_rng(num_tokens + segment)
    end = torch.from_numpy(random_end(rng, num_tokens, longest=segment)).cuda()
    inputs = tensors(rng, num_tokens, (8, 2), 64, dtype, "cuda")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out = planner("flex")(end)(*inputs, SCALE)
    expected = textbook(*exact, visibility(end), SCALE)
    pairs = zip(
        [out, *gradients(out, inputs)], [expected, *gradients(expected, exact)], strict=True
    )
    for found, wanted in pairs:
        assert (found.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max())


def test_flex_wants_multiples_of_128():
    assert alignment("auto") == alignment("flex") == 128
