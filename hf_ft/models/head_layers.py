"""The layers of a head that produce the logits."""

from __future__ import annotations

from torch import Tensor, nn

from hf_ft.models.names import Names


def logit_layers(model: nn.Module, head: Names, trainable: bool = True) -> Names:
    """The layers of a head that produce the logits: the last one with a weight. Empty if there is none.

    Two of the same shape (as in distilled models, which average their logits, or an ensemble's members) both count. A
    square layer counts on its own, since the layer before it may happen to have the same shape.

    Args:
        head: names of the head's modules.
        trainable: whether the weight must be trainable.
    """
    layers: dict[str, Tensor] = {}
    for prefix in head:
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() > 1 and (weight.requires_grad or not trainable):
                layers[name] = weight
    if not layers:
        return ()
    last, weight = list(layers.items())[-1]
    square = weight.shape[0] == weight.shape[1]
    return (last,) if square else tuple(name for name, other in layers.items() if other.shape == weight.shape)


def adapter_around(model: nn.Module, name: str) -> str | None:
    """Name of the module with an adapter, as PEFT creates them, to which a layer belongs."""
    ends = [i for i, letter in enumerate(name) if letter == "."]
    return next((name[:i] for i in ends if hasattr(model.get_submodule(name[:i]), "base_layer")), None)
