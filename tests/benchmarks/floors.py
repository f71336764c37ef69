"""The floor of a training step: a loop in plain torch that does what the method cannot do without, and nothing else.

Included: the forward pass of frozen parts (unless their output is recorded), further forward passes of frozen copies,
the forward and backward pass of trained parts with the cross-entropy of each head, and their SGD update. Not included:
the method's own terms, clipping, schedules, logs, data loading and hooks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import stepper
import torch
from peft import LoraConfig, inject_adapter_in_model
from stepper import SOURCE_CLASSES, resnet18, seconds
from torch import Tensor, nn

# A ResNet-18 as a chain: stem, two blocks in each of four stages, pooling, head.
FIRST_PART = {"stem": 0, "stage0": 1, "stage1": 3, "stage2": 5, "stage3": 7, "head": 10}


@dataclass(frozen=True)
class Floor:
    """What runs in a step.

    Attributes:
        trains_from: the first part of the model that is trained; earlier parts run forward only, in eval mode.
        trains: which of the weights from there on are trained, besides the head: all, the biases (of norms, too), those
            of norms, or LoRA adapters of rank 8 in the blocks.
        recorded: whether the output of the earlier parts is already available.
        norms: mode of the BatchNorm layers that are trained.
        batches: number of batches of samples; with two, the second is source data, for the source head.
        references: forward passes, without gradient, of frozen copies of everything but the head.
        source_head: whether a second head, for the 1,000 source classes, is trained as well.
        members: models that train together, each on the same images with its own loss.
    """

    trains_from: Literal["stem", "stage0", "stage1", "stage2", "stage3", "head"] = "stem"
    trains: Literal["all", "biases", "norms", "lora"] = "all"
    recorded: bool = False
    norms: Literal["train", "eval"] = "train"
    batches: Literal[1, 2] = 1
    references: int = 0
    source_head: bool = False
    members: int = 1

    def __post_init__(self) -> None:
        if self.trains_from not in FIRST_PART:
            raise ValueError(f"Floor.trains_from={self.trains_from!r}: choose one of {', '.join(FIRST_PART)}.")
        if self.recorded and self.trains_from == "stem":
            raise ValueError("Floor.recorded=True with trains_from='stem': nothing comes before the stem.")
        if self.batches == 2 and not self.source_head:
            raise ValueError("Floor.batches=2 needs source_head=True: the second batch has source labels.")


def parts_of_resnet() -> nn.ModuleList:
    """A new ResNet-18 as a chain."""
    model = resnet18()
    blocks = [block for stage in model.resnet.encoder.stages for block in stage.layers]
    pooling = nn.Sequential(model.resnet.pooler, nn.Flatten())
    return nn.ModuleList([model.resnet.embedder, *blocks, pooling, model.classifier[-1]])


def trained(body: nn.Module, what: str) -> nn.Module:
    """The body with only a part of its weights trainable, or with adapters."""
    if what == "lora":
        _, *blocks = body.named_children()
        names = [
            f"{part}.{name}" for part, block in blocks for name, layer in block.named_modules() if adaptable(layer)
        ]
        return inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=names), body)
    if what != "all":
        body.requires_grad_(False)
        for layer in body.modules():
            if what == "norms" and isinstance(layer, nn.BatchNorm2d):
                layer.requires_grad_(True)
            bias = getattr(layer, "bias", None)
            if what == "biases" and bias is not None:
                bias.requires_grad_(True)
    return body


def adaptable(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.Linear)


class Member:
    """One model in a floor: its frozen parts, its trained parts, and the input of the latter if it is recorded."""

    def __init__(self, floor: Floor, pixels: Tensor) -> None:
        begin, parts = FIRST_PART[floor.trains_from], parts_of_resnet().to(pixels.device)
        self.frozen = nn.Sequential(*parts[:begin]).eval().requires_grad_(False)
        self.body = trained(nn.Sequential(*parts[begin:-1]), floor.trains).train(floor.norms == "train")
        self.head = parts[-1]
        self.source_head = None
        if floor.source_head:
            self.source_head = nn.Linear(self.head.in_features, SOURCE_CLASSES, device=pixels.device)
        self.recorded = None
        if floor.recorded:
            with torch.no_grad():
                self.recorded = self.frozen(pixels)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        modules = [self.body, self.head, self.source_head]
        return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        state = self.recorded
        if state is None:
            with torch.no_grad():
                state = self.frozen(pixels)
        features = self.body(state)
        loss = nn.functional.cross_entropy(self.head(features[: len(labels)]), labels)
        if self.source_head is not None:
            loss = loss + nn.functional.cross_entropy(self.source_head(features[-len(labels) :]), labels)
        return loss


class FloorStepper:
    """A floor that is ready to take steps."""

    def __init__(self, floor: Floor, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        shape = floor.batches * stepper.BATCH, 3, stepper.PIXELS, stepper.PIXELS
        self.pixels = torch.randn(shape, generator=generator).to(device)
        self.labels = torch.arange(stepper.BATCH, device=device) % 2
        self.members = [Member(floor, self.pixels) for _ in range(floor.members)]
        backbone = nn.Sequential(*parts_of_resnet()[:-1]).to(device).eval()
        self.references = [copy.deepcopy(backbone) for _ in range(floor.references)]
        parameters = [p for member in self.members for p in member.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step(self) -> float:
        """Take a step, and return its time in seconds."""
        started = seconds()
        with torch.no_grad():
            for reference in self.references:
                reference(self.pixels)
        first, *others = (member.loss(self.pixels, self.labels) for member in self.members)
        loss = sum(others, start=first)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return seconds() - started
