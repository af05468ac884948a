"""Log-probs and entropies against torch's own softmax."""

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

E, V = 9, 50


def inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (6 * torch.randn(E, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (E,), generator=generator)
    temperature = torch.rand(E, generator=generator) + 0.5
    weights = torch.randn(2, E, generator=generator, dtype=torch.float64)
    return logits, labels, temperature, weights


def expected(logits, labels, temperature):
    logprobs = (logits / temperature[:, None]).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.stack([logprobs.gather(1, labels[:, None])[:, 0], entropy])


def gradients(dtype, *, with_entropy_gradient):
    """Of a weighted sum of both rows: ours, and torch's in float64."""
    from treepo_async.learner.model.head import token_logprobs

    logits, labels, temperature, weights = inputs(dtype)
    mine = logits.clone().requires_grad_()
    found = token_logprobs(mine, labels, temperature, with_entropy_gradient=with_entropy_gradient)
    (found * weights).sum().backward()
    theirs = logits.double().requires_grad_()
    wanted = expected(theirs, labels, temperature.double())
    (wanted * weights).sum().backward()
    return mine.grad, theirs.grad


@pytest.mark.parametrize(
    ("dtype", "returned", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
    ],
)
def test_values_are_those_of_the_logits_in_float32_or_float64(dtype, returned, tolerance):
    from treepo_async.learner.model.head import token_logprobs

    logits, labels, temperature, _ = inputs(dtype)
    before = logits.clone()
    found = token_logprobs(logits, labels, temperature)
    assert found.dtype == returned
    assert torch.equal(logits, before)
    wanted = expected(logits.double(), labels, temperature.double())
    assert torch.allclose(found.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_both_have_torchs_gradient_where_the_entropy_is_asked_for_one(dtype, tolerance):
    found, wanted = gradients(dtype, with_entropy_gradient=True)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=tolerance)


def test_else_the_entropys_gradient_is_zero():
    found, wanted = gradients(torch.float64, with_entropy_gradient=False)
    assert not torch.allclose(found, wanted, rtol=0, atol=1e-2)
    logits, labels, temperature, weights = inputs(torch.float64)
    logits.requires_grad_()
    (expected(logits, labels, temperature.double())[0] * weights[0]).sum().backward()
    assert torch.allclose(found, logits.grad, rtol=0, atol=1e-13)


def test_logits_too_large_for_an_exponential_are_no_trouble():
    from treepo_async.learner.model.head import token_logprobs

    logits = torch.tensor([[3e4, 0.0, -3e4]], requires_grad=True)
    found = token_logprobs(logits, torch.tensor([1]), torch.ones(1), with_entropy_gradient=True)
    assert found.tolist() == [[-3e4], [0.0]]
    found.sum().backward()
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_no_tokens_give_no_numbers_and_a_gradient_of_zeros():
    from treepo_async.learner.model.head import token_logprobs

    logits = torch.empty(0, V, requires_grad=True)
    found = token_logprobs(logits, torch.empty(0, dtype=torch.long), torch.empty(0))
    assert found.shape == (2, 0)
    found.sum().backward()
    assert logits.grad.shape == (0, V)
