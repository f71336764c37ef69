"""The second network of Bi-tuning: a moving average of the one in training, and what it has seen of each class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.core import EVERYTHING, Names, OptionError, View
from hf_ft.models.border import has_parameters
from hf_ft.models.head_layers import adapter_around, logit_layers
from hf_ft.models.preserve import random_states_kept
from hf_ft.strategies.bi_tuning.loss import class_contrast, enqueue, next_slots, unit, with_bias


def classifier_of(model: nn.Module, head: Names) -> str:
    """Name of the linear layer that computes a model's logits.

    Raises:
        OptionError: if they do not come from a single linear layer.
    """
    modules = tuple(name for name in head if has_parameters(model, name))
    layers = logit_layers(model, modules) or logit_layers(model, modules, trainable=False)
    # A wrapper, such as PEFT puts around a head that trains, contains the weight of the layer.
    layers = tuple({model.get_submodule(name).weight: name for name in layers}.values())
    one = len(layers) == 1 and isinstance(model.get_submodule(layers[0]), nn.Linear)
    if not one or adapter_around(model, layers[0]) is not None:
        raise OptionError(
            f"bi_tuning compares features with the weights of the classes, but the logits of {type(model).__name__} "
            f"come from {', '.join(layers) or ', '.join(head)}, not from one linear layer. Name it with head=..., or "
            "use BSSConfig, which uses the features alone."
        )
    return layers[0]


class BiTuningLoss(nn.Module):
    """The contrastive losses on the classifier and on the projector.

    What a checkpoint must hold is in its parameters and buffers: the projector, which trains; the key encoder, an
    average of model and projector; and the queues. All but the projector are frozen *parameters*, because DDP sends
    the buffers of the first process to all others in every step.

    Args:
        head: names of the modules of a model's head.
        dimensions: of the projections.
        size: number of keys kept per class.
        momentum: share of the average that remains after a step.
    """

    queued_inputs: Tensor
    queued_projections: Tensor
    position: Tensor

    def __init__(
        self, head: Callable[[nn.Module], Names], dimensions: int, size: int, momentum: float, temperature: float
    ) -> None:
        super().__init__()
        self._head, self._dimensions, self._size = head, dimensions, size
        self._momentum, self._temperature = momentum, temperature
        self._classifier = ""
        self._modules_of_both: list[tuple[nn.Module, nn.Module]] = []
        self._weights: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._widened = False
        self._seen: tuple[float, int] | None = None

    def begin(self, model: nn.Module) -> None:
        """Copy the model, and draw projector and queues: the same on every process, and whenever it is set up again."""
        self._classifier = classifier_of(model, self._head(model))
        layer: Any = model.get_submodule(self._classifier)
        classes, width = layer.weight.shape
        with random_states_kept(torch.initial_seed() % 2**32):
            projector = nn.Linear(width, self._dimensions)
            # The last queue takes samples without a label: to leave them out, a GPU would have to count them.
            queued_inputs = unit(torch.randn(classes + 1, self._size, width + (layer.bias is not None)))
            queued_projections = unit(torch.randn(classes + 1, self._size, self._dimensions))
        device, dtype = layer.weight.device, torch.promote_types(layer.weight.dtype, torch.float32)
        self.projector = projector.to(device, dtype)
        self.network, self.key_projector = copy.deepcopy(model), copy.deepcopy(self.projector)
        self._widened = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.network.parameters())
        if self._widened:  # in half precision, a thousandth of a step would be lost
            self.network.float()
        for module in (self.network, self.key_projector):
            module.requires_grad_(False)
        self.queued_inputs = nn.Parameter(queued_inputs.to(device, dtype), requires_grad=False)
        self.queued_projections = nn.Parameter(queued_projections.to(device, dtype), requires_grad=False)
        self.register_buffer("position", torch.zeros(classes + 1, dtype=torch.long, device=device))
        self._modules_of_both = list(zip(model.modules(), self.network.modules(), strict=True))
        self._weights = [*model.parameters(), *self.projector.parameters()]
        self._averages = [*self.network.parameters(), *self.key_projector.parameters()]

    def forward(self, view: View) -> Tensor:
        labels = _checked(view.batch["labels"])
        labelled = labels >= 0
        self._follow(view)
        inputs = self._of(view.logit_inputs)
        layer: Any = view.model.get_submodule(self._classifier)
        one = None if layer.bias is None else 1.0
        queries, projections = with_bias(inputs, one), unit(self.projector(inputs))
        with torch.no_grad():
            key_inputs = self._of(view.logit_inputs_of(self.network, view.second_view))
            keys, key_projections = with_bias(key_inputs, one), unit(self.key_projector(key_inputs))
            classes, queues = labels.clamp(min=0), torch.where(labelled, labels, len(layer.weight))
            weights = with_bias(layer.weight.to(keys), layer.bias)[classes]
            # A copy, for the gradient: the queue changes before it is computed.
            earlier = self.queued_projections[:-1].clone()
            self._keep(view.gathered(keys), view.gathered(key_projections), view.gathered(queues))
            others = torch.einsum("bd,ckd->bck", weights, self.queued_inputs[:-1])
        of_classifier = class_contrast((queries * weights).sum(1), others, classes, self._temperature)
        others = torch.einsum("bd,ckd->bck", projections, earlier)
        own = (projections * key_projections).sum(1)
        losses = of_classifier + class_contrast(own, others, classes, self._temperature)
        return (losses * labelled).sum() / labelled.sum().clamp(min=1)

    @torch.no_grad()
    def _follow(self, view: View) -> None:
        """Average the weights once per optimizer step, in its first micro-batch; adopt the modes of the model."""
        # If nobody reports progress, the version of a weight reveals that a step was taken.
        now = view.progress, view.weights(EVERYTHING)[-1]._version
        if now != self._seen:
            self._seen = now
            weights = [w.float() for w in self._weights] if self._widened else self._weights
            torch._foreach_lerp_(self._averages, weights, 1 - self._momentum)
        for module, copied in self._modules_of_both:
            copied.__dict__["training"] = module.training  # torch's own way takes ten times as long

    def _of(self, inputs: Tensor | None) -> Tensor:
        if inputs is None or inputs.dim() != 2:
            shape = None if inputs is None else tuple(inputs.shape)
            raise OptionError(
                f"bi_tuning: the input of {self._classifier} is {shape}, not one vector per sample (B, d), nor can it "
                "be pooled as the logits are. Name another module with head=..., or use L2SPConfig."
            )
        return inputs

    def _keep(self, keys: Tensor, projections: Tensor, labels: Tensor) -> None:
        slots, position = next_slots(labels, self.position, self._size)
        enqueue(self.queued_inputs, labels, keys, slots)
        enqueue(self.queued_projections, labels, projections, slots)
        self.position.copy_(position)


def _checked(labels: Tensor) -> Tensor:
    if labels.dim() != 1 or labels.is_floating_point():
        raise OptionError(
            f"bi_tuning keeps features by class, so it needs one class per sample, but labels are {labels.dtype} of "
            f"shape {tuple(labels.shape)}: train without mixed samples, or with another strategy."
        )
    return labels.long()
