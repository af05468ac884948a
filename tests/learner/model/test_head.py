"""Log-probs and entropies against torch's own softmax."""

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

E, V = 9, 50


@pytest.fixture(params=["written out", "fused", "fused, traced"])
def token_logprobs(request):
    """What a CPU runs, and what CUDA does: its kernels as they stand, and as torch traces them."""
    from treepo_async.learner.attention.compiled import compiled
    from treepo_async.learner.model import head, head_fused

    if request.param == "written out":
        return head.token_logprobs
    kernels = head_fused.PLAIN
    if request.param == "fused, traced":
        kernels = head_fused.Kernels(*(compiled(k, most=32, backend="eager") for k in kernels))

    def fused(logits, labels, temperature, *, with_entropy_gradient=False):
        return head_fused.FusedTokenLogprobs.apply(
            logits, labels, temperature, with_entropy_gradient, kernels
        )

    return fused


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


def gradients(token_logprobs, dtype, *, with_entropy_gradient):
    """Of a weighted sum of both rows: ours, and torch's in float64."""
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
def test_values_are_those_of_the_logits_in_float32_or_float64(
    token_logprobs, dtype, returned, tolerance
):
    logits, labels, temperature, _ = inputs(dtype)
    before = logits.clone()
    found = token_logprobs(logits, labels, temperature)
    assert found.dtype == returned
    assert torch.equal(logits, before)
    wanted = expected(logits.double(), labels, temperature.double())
    assert torch.allclose(found.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_both_have_torchs_gradient_where_the_entropy_is_asked_for_one(
    token_logprobs, dtype, tolerance
):
    found, wanted = gradients(token_logprobs, dtype, with_entropy_gradient=True)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=tolerance)


def test_else_the_entropys_gradient_is_zero(token_logprobs):
    found, wanted = gradients(token_logprobs, torch.float64, with_entropy_gradient=False)
    assert not torch.allclose(found, wanted, rtol=0, atol=1e-2)
    logits, labels, temperature, weights = inputs(torch.float64)
    logits.requires_grad_()
    (expected(logits, labels, temperature.double())[0] * weights[0]).sum().backward()
    assert torch.allclose(found, logits.grad, rtol=0, atol=1e-13)


def test_logits_too_large_for_an_exponential_are_no_trouble(token_logprobs):
    logits = torch.tensor([[3e4, 0.0, -3e4]], requires_grad=True)
    found = token_logprobs(logits, torch.tensor([1]), torch.ones(1), with_entropy_gradient=True)
    assert found.tolist() == [[-3e4], [0.0]]
    found.sum().backward()
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_no_tokens_give_no_numbers_and_a_gradient_of_zeros(token_logprobs):
    logits = torch.empty(0, V, requires_grad=True)
    found = token_logprobs(logits, torch.empty(0, dtype=torch.long), torch.empty(0))
    assert found.shape == (2, 0)
    found.sum().backward()
    assert logits.grad.shape == (0, V)


def test_the_shares_of_a_vocabulary_add_up_to_the_whole():
    from treepo_async.learner.model import head_fused

    logits, labels, temperature, _ = inputs(torch.float64)
    peak = (logits / temperature[:, None]).amax(-1)

    def sums(share, rank):
        place = head_fused.places(labels, share.shape[1], rank)
        chosen = head_fused.chosen_share(share, temperature, peak, place)
        return torch.stack([*head_fused.sums(share, temperature, peak), chosen])

    whole = sums(logits, 0)
    shares = sum(sums(share, rank) for rank, share in enumerate(logits.chunk(2, dim=1)))
    assert torch.allclose(shares, whole, rtol=0, atol=1e-12)
    places = torch.stack([head_fused.places(labels, V // 2, rank) for rank in (0, 1)])
    assert ((places >= 0).sum(0) == 1).all()
    assert torch.equal(places.max(0).values, labels % (V // 2))


def test_of_a_vocabulary_that_is_split_the_other_ranks_label_leaves_no_gradient():
    """A label that is not here adds nothing to this rank's columns but the softmax's share."""
    from treepo_async.learner.model import head_fused

    logits = torch.randn(E, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    temperature, one = (
        torch.full((E,), 0.7, dtype=torch.float64),
        torch.ones(E, dtype=torch.float64),
    )
    place = torch.full((E,), -1)
    shift = (logits / 0.7).logsumexp(-1)
    found = head_fused.gradient(logits, temperature, shift, place, one, None, one)
    assert torch.allclose(found, -(logits / 0.7).softmax(-1) / 0.7, rtol=0, atol=1e-13)
