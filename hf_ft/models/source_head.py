"""The pretrained head, kept alongside a model that has a new one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy, unwrap
from hf_ft.models.feature_hooks import INPUT

__all__ = [
    "SourceHead",
    "attach_source_head",
    "has_source_head",
    "head_input",
    "head_module",
    "renew_head",
    "source_head",
]

ATTRIBUTE = "_source_head"


class SourceHead(nn.Module):
    """A pretrained head: maps the input of the model's head, (B, ...), to source logits (B, C_s).

    Args:
        module: the head module of the pretrained model.
        names: class names by index, where the checkpoint has them.
    """

    def __init__(self, module: nn.Module, names: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.module = module
        self.names = dict(names or {})

    @property
    def classes(self) -> int:
        """The number of source classes."""
        last = [m for m in self.module.modules() if isinstance(m, nn.Linear)]
        return len(self.names) or (last[-1].out_features if last else 0)

    def forward(self, state: Tensor) -> Tensor:
        logits = self.module(state.to(next(self.module.parameters()).dtype))
        if logits.dim() == 3 and logits.shape[1] == 1:
            logits = logits.squeeze(1)
        if logits.dim() != 2:
            raise OptionError(
                f"the pretrained head outputs {tuple(logits.shape)}, not one row of logits per sample: this model "
                "picks a token after its head. Strategies that keep the source head cannot be used with it."
            )
        return logits.float()


def head_module(model: nn.Module, head: str | None = None, blocks: str | None = None) -> str:
    """The name of the only module of the head that has parameters.

    Raises:
        OptionError: if there are several.
    """
    names = [
        name
        for name in anatomy(model, head=head, blocks=blocks).head.modules
        if next(_module(model, name).parameters(), None) is not None
    ]
    if len(names) != 1:
        raise OptionError(
            f"the head consists of {len(names)} modules with parameters ({', '.join(names)}), but a source head can "
            "only be kept if it is a single one. Name it with head='...', or use a strategy that does not need one."
        )
    return names[0]


def head_input(model: nn.Module, head: str | None = None, blocks: str | None = None) -> str:
    """The layer that holds the input of the head."""
    return INPUT + head_module(model, head, blocks)


def attach_source_head(model: nn.Module, source_head: SourceHead) -> None:
    """Attach a pretrained head to a model, outside its module tree: it is neither saved nor trained with the model."""
    unwrap(model)[0].__dict__[ATTRIBUTE] = source_head


def has_source_head(model: nn.Module) -> bool:
    return ATTRIBUTE in unwrap(model)[0].__dict__


def source_head(model: nn.Module) -> SourceHead:
    """A copy of the pretrained head attached to a model.

    Raises:
        OptionError: if there is none.
    """
    require_source_head(model)
    return copy.deepcopy(unwrap(model)[0].__dict__[ATTRIBUTE])


def require_source_head(model: nn.Module) -> None:
    """Reject a model without a source head.

    Raises:
        OptionError: if there is none.
    """
    if not has_source_head(model):
        raise OptionError(
            "the model has no source head (its pretrained head): load it with hf_ft.from_pretrained(name, "
            "num_labels=...), which keeps it alongside the new head. It is removed after training, and missing if the "
            "checkpoint had none."
        )


def drop_source_head(model: nn.Module) -> nn.Module:
    """Drop the pretrained head, if there is one."""
    unwrap(model)[0].__dict__.pop(ATTRIBUTE, None)
    return model


@torch.no_grad()
def renew_head(model: Any, labels: Mapping[str, Any], head: str | None = None) -> None:
    """Give a Transformers model a new head and keep the current one as its source head.

    The new head is initialised by the model class; nothing else is touched or loaded.

    Args:
        labels: label settings of the config: ``num_labels``, ``id2label``, ``label2id``.
        head: name of the head, where it cannot be found automatically.

    Raises:
        OptionError: if the head is not a single module.
    """
    name = head_module(model, head)
    old = model.get_submodule(name)
    config = copy.deepcopy(model.config)
    class_names = dict(config.id2label) if config.id2label else {}
    for key, value in labels.items():  # num_labels first, since it resets the class names
        setattr(config, key, value)
    with torch.device("meta"):
        fresh = type(model)(config)
    new = fresh.get_submodule(name).to_empty(device=next(old.parameters()).device)
    for module in new.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        fresh._init_weights(module)
    model.set_submodule(name, new.to(next(old.parameters()).dtype).train(old.training))
    for key, value in labels.items():
        setattr(model.config, key, value)
    if hasattr(model, "num_labels"):
        model.num_labels = model.config.num_labels
    attach_source_head(model, SourceHead(old, class_names))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a bare parameter
        return nn.Module()
