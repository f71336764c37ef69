"""Rows spread over a data set."""

from __future__ import annotations

import torch


def share_of_batches(samples: int, batch_size: int, seed: int, rank: int, ranks: int) -> list[list[int]]:
    """The batches of one rank, as indices: every ``ranks``-th of one shuffled sequence.

    Whole batches are dealt out, so that what stands together in a batch is the same on any number of ranks.
    A rank may get fewer than another, or none. accelerate's samplers repeat samples instead, so that all ranks
    get as many: a mean would count those twice.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, samples, batch_size)]
    return batches[rank::ranks]
