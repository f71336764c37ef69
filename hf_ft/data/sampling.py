"""Distribution of rows over ranks."""

from __future__ import annotations

import torch


def share_of_batches(samples: int, batch_size: int, seed: int, rank: int, ranks: int) -> list[list[int]]:
    """The batches of one rank, as indices: every ``ranks``-th batch of a shuffled sequence.

    Batches are distributed whole, so that their composition is the same for any number of ranks. A rank may get fewer
    batches than another, or none. accelerate's samplers instead repeat samples to give all ranks equally many, and a
    mean would count those twice.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, samples, batch_size)]
    return batches[rank::ranks]
