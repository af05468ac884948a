import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.errors import WeightsError
from treepo_async.learner.broadcast_copy import Copies
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import TensorInfo

FIRST, SECOND, THIRD = (PolicyVersion(0, step) for step in (1, 2, 3))


def tensors_of(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(f"t{i}", torch.randn(size, generator=generator)) for i, size in enumerate(sizes)]


def bytes_of(tensors, dtype=torch.float32):
    flat = [tensor.to(dtype).reshape(-1).view(torch.uint8) for _, tensor in tensors]
    return torch.cat(flat).numpy().tobytes()


def held(copies, version):
    with copies.using(version) as buckets:
        return b"".join(bucket.data.numpy().tobytes() for bucket in buckets)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    capacity=st.integers(1, 30).map(lambda n: 4 * n),
)
def test_buckets_hold_all_bytes_in_order_and_no_more_than_fits(sizes, capacity):
    copies, tensors = Copies(capacity), tensors_of(sizes)
    part = copies.add(FIRST, tensors, torch.float32)
    assert held(copies, FIRST) == bytes_of(tensors)
    assert [name for bucket in part.buckets for name in bucket] == [name for name, _ in tensors]
    for bucket in part.buckets:
        size = sum(4 * sizes[int(name[1:])] for name in bucket)
        assert size <= capacity or len([n for n in bucket if sizes[int(n[1:])]]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_described_and_copied_in_the_dtype_they_are_sent_in(dtype):
    view = torch.arange(12, dtype=torch.float32).reshape(3, 4).T
    copies = Copies(1024)
    part = copies.add(FIRST, [("x", view)], dtype)
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert part.tensors == {"x": TensorInfo(name, (4, 3))}
    assert held(copies, FIRST) == bytes_of([("x", view)], dtype)


def test_a_copy_does_not_follow_the_weights_that_it_was_taken_of():
    copies, tensors = Copies(64), tensors_of([5])
    before = bytes_of(tensors)
    copies.add(FIRST, tensors, torch.float32)
    tensors[0][1].zero_()
    assert held(copies, FIRST) == before


def test_only_kept_versions_stay_beside_the_newest():
    copies = Copies(64)
    for seed, (version, keep) in enumerate([(FIRST, []), (SECOND, [FIRST]), (THIRD, [FIRST])]):
        copies.add(version, tensors_of([5], seed), torch.float32, keep=keep)
    assert held(copies, FIRST) == bytes_of(tensors_of([5], 0))
    assert held(copies, THIRD) == bytes_of(tensors_of([5], 2))
    with (
        pytest.raises(WeightsError, match=r"the copy of version 0\.2 is gone"),
        copies.using(SECOND),
    ):
        pass


def test_memory_of_a_dropped_version_is_used_again_but_not_while_it_is_being_sent():
    copies = Copies(64)
    copies.add(FIRST, tensors_of([5], 0), torch.float32)
    with copies.using(FIRST) as sent:
        address = sent[0].buffer.data_ptr()
        copies.add(SECOND, tensors_of([5], 1), torch.float32)
        assert sent[0].data.numpy().tobytes() == bytes_of(tensors_of([5], 0))
    copies.add(THIRD, tensors_of([5], 2), torch.float32, keep=[SECOND])
    with copies.using(THIRD) as buckets:
        assert buckets[0].buffer.data_ptr() == address
