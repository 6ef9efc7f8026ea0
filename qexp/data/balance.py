"""Seeded draws with equal numbers per class."""

import torch
from torch import Tensor


def balanced(labels: Tensor, n: int, seed: int) -> Tensor:
    """The positions [min(n, N)] of a class-balanced random draw without replacement from `labels` [N].

    Class counts differ by at most one while every class has enough members; the other classes
    replace one that runs out. Classes alternate in the result, and a larger `n` only appends to a smaller one's draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    classes, shuffled = labels[order].unique(return_inverse=True)
    turn = torch.empty_like(shuffled)  # how many of the same class come before it in the shuffled order
    for c in range(len(classes)):
        members = shuffled == c
        turn[members] = torch.arange(int(members.sum()))
    # Each turn draws which class goes first, so that the remainder of n / classes favours no class.
    turns = int(turn.max()) + 1 if len(turn) else 0
    tie = torch.rand(turns, len(classes), generator=generator, dtype=torch.float64)
    return order[(turn + tie[turn, shuffled]).argsort()[:n]]
