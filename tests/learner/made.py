"""Trained tokens made by hand, for formulas in closed form."""

import torch

from treepo_async.learner.packing.edges import Edges
from treepo_async.types import ROOT


def edges_of(
    lengths,
    *,
    parents=None,
    levels=None,
    paths=None,
    positive=0.0,
    negative=0.0,
    behavior=0.0,
    proximal=None,
    reference=None,
    lag=1,
    fresh=False,
):
    """Tokens of slots of the given lengths.

    Args:
        lengths: [M].
        parents: [M]; default: each slot continues the one before.
        levels: [M]; default: a level each.
        paths: slots of each trajectory; default: one through all of them.
        positive: P of each token, one number or [E]; a trajectory has as much on each of its tokens.
        negative: N, likewise.
        behavior: [E] or one number.
        proximal: [E] or None.
        reference: [E] or None.
        lag: of each slot, [M] or one number.
        fresh: of each token, [E] or one value.
    """
    num_slots = len(lengths)
    slot = torch.repeat_interleave(torch.arange(num_slots), torch.tensor(lengths))
    paths = [list(range(num_slots))] if paths is None else paths
    path_slot = torch.tensor([s for path in paths for s in path])

    def each(value, dtype=torch.float64):
        return torch.as_tensor(value, dtype=dtype).expand(len(slot)).clone()

    def of_slots(values, dtype=torch.int64):
        return torch.as_tensor(values, dtype=dtype).expand(num_slots)[slot].clone()

    first = torch.searchsorted(slot, torch.arange(num_slots))
    count = torch.bincount(path_slot, minlength=num_slots).double()
    path_positive, path_negative = (each(v)[first][path_slot] for v in (positive, negative))
    return Edges(
        prev=torch.zeros_like(slot),
        label=torch.zeros_like(slot),
        temperature=each(1.0),
        positive=each(positive),
        negative=each(negative),
        weight=each(1.0),
        count=count[slot],
        behavior_logprobs=each(behavior),
        proximal_logprobs=None if proximal is None else each(proximal),
        reference_logprobs=None if reference is None else each(reference),
        is_fresh=each(fresh, torch.bool),
        lag=of_slots(lag),
        level=of_slots(list(range(num_slots)) if levels is None else levels),
        slot=slot,
        slot_parent=torch.tensor(list(range(ROOT, num_slots - 1)) if parents is None else parents),
        path_trajectory=torch.tensor([j for j, path in enumerate(paths) for _ in path]),
        path_slot=path_slot,
        path_positive=path_positive,
        path_negative=path_negative,
    )


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)
