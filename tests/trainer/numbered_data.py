"""Datasets whose samples record their number, and what random augmentation drew for them."""

import json
import random

import numpy as np
import torch


def sample(number):
    return {"number": number, "drawn": [random.random(), np.random.rand(), torch.rand(()).item()]}


class Numbered(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return sample(row)


class NumberedPasses(torch.utils.data.IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (sample(number) for number in range(self.count))


def numbers(file):
    """What was recorded for each batch that was trained on."""
    return [json.loads(line) for line in file.read_text().splitlines()]
