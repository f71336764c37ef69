"""The pretrained head, kept beside a model that has a new one."""

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
    """A pretrained head: what came into the model's head goes in, (B, ...), source logits (B, C_s) come out.

    Args:
        module: the model's own module.
        names: of its classes, by number, where the checkpoint knew them.
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
        if logits.dim() != 2:
            raise OptionError(
                f"the pretrained head gives {tuple(logits.shape)}, not one row of logits per sample: this model picks "
                "a token after its head. Strategies that keep the source head cannot be used with it."
            )
        return logits.float()


def head_module(model: nn.Module, head: str | None = None, blocks: str | None = None) -> str:
    """The name of the one module of the head that has parameters.

    Raises:
        OptionError: there are several.
    """
    names = [
        name
        for name in anatomy(model, head=head, blocks=blocks).head.modules
        if next(_module(model, name).parameters(), None) is not None
    ]
    if len(names) != 1:
        raise OptionError(
            f"the head consists of {len(names)} modules with parameters ({', '.join(names)}): a source head can be "
            "kept only where it is one. Name it with head='...', or use a strategy that needs none."
        )
    return names[0]


def head_input(model: nn.Module, head: str | None = None, blocks: str | None = None) -> str:
    """The layer that holds what comes into the head."""
    return INPUT + head_module(model, head, blocks)


def attach_source_head(model: nn.Module, source_head: SourceHead) -> None:
    """Keep a pretrained head with a model, outside of its module tree: it is neither saved nor trained as a part."""
    unwrap(model)[0].__dict__[ATTRIBUTE] = source_head


def has_source_head(model: nn.Module) -> bool:
    return ATTRIBUTE in unwrap(model)[0].__dict__


def source_head(model: nn.Module) -> SourceHead:
    """A copy of the pretrained head that is kept with a model.

    Raises:
        OptionError: there is none.
    """
    require_source_head(model)
    return copy.deepcopy(unwrap(model)[0].__dict__[ATTRIBUTE])


def require_source_head(model: nn.Module) -> None:
    """Refuse a model without a source head.

    Raises:
        OptionError: there is none.
    """
    if not has_source_head(model):
        raise OptionError(
            "the model has no source head (that of its pretraining): load it with hf_ft.from_pretrained(name, "
            "num_labels=...), which keeps it beside the new head. It is gone after training, and where a checkpoint "
            "never had one."
        )


def drop_source_head(model: nn.Module) -> nn.Module:
    """Let go of the pretrained head, where there is one."""
    unwrap(model)[0].__dict__.pop(ATTRIBUTE, None)
    return model


@torch.no_grad()
def renew_head(model: Any, labels: Mapping[str, Any], head: str | None = None) -> None:
    """Give a model of Transformers a new head, and keep the one that it has as its source head.

    The new head is initialised as the model class does it; nothing else is touched or loaded.

    Args:
        labels: of its config: ``num_labels``, ``id2label``, ``label2id``.
        head: the name of its head, where that cannot be found.

    Raises:
        OptionError: the head is not one module.
    """
    name = head_module(model, head)
    old = model.get_submodule(name)
    config = copy.deepcopy(model.config)
    known = dict(config.id2label) if config.id2label else {}
    for key, value in labels.items():  # num_labels first: it resets the names
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
    attach_source_head(model, SourceHead(old, known))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a single parameter
        return nn.Module()
