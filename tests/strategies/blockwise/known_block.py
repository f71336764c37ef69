"""A tiny network that knows its task, except for one known block."""

import torch
from torch import nn

from hf_ft.testing.models import tiny_mobilenet_v1

CLASSES = 4


def images(samples, seed):
    """Noisy images of four fixed patterns, and the pattern of each."""
    patterns = torch.nn.functional.interpolate(
        torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0)), size=32, mode="bilinear"
    )
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=random)
    return 2 * patterns[labels] + 0.5 * torch.randn(samples, 3, 32, 32, generator=random), labels


class Images(torch.utils.data.Dataset):
    def __init__(self, samples, seed=1):
        self.pixels, self.labels = images(samples, seed)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"pixel_values": self.pixels[row], "labels": self.labels[row]}


def knowing_model(steps=120):
    """A plain chain of 13 blocks, without shortcuts, trained on the task."""
    torch.manual_seed(0)
    model = tiny_mobilenet_v1(num_labels=CLASSES, depth_multiplier=0.125, min_depth=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        pixels, labels = images(64, 1000 + step)
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model, samples=256):
    pixels, labels = images(samples, 7)
    return float((model(pixel_values=pixels).logits.argmax(-1) == labels).float().mean())


@torch.no_grad()
def break_block(model, block):
    """Make a block's output constant, so that every other candidate's inputs or outputs become worthless."""
    model.mobilenet_v1.layer[2 * block + 1].convolution.weight.zero_()
    return model
