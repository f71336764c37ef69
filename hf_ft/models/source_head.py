"""The pretrained head, kept alongside a model that has a new one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.models.anatomy import anatomy, unwrap
from hf_ft.models.border import Border, has_parameters, put, run_to_head
from hf_ft.models.feature_hooks import INPUT
from hf_ft.models.names import Names
from hf_ft.models.preserve import evaluating
from hf_ft.models.redraw import draw

__all__ = [
    "SourceHead",
    "attach_source_head",
    "attached_source_head",
    "border_head",
    "has_source_head",
    "head_input",
    "head_module",
    "head_modules",
    "pretrained_logits",
    "renew_head",
    "source_head",
]

ATTRIBUTE = "_source_head"


class SourceHead(nn.Module):
    """A pretrained head.

    Args:
        module: the modules of the pretrained model's head by name; or the module, if there is only one.
        names: class names by index, if the checkpoint has them.

    Attributes:
        module: the module, or a list of several.
        paths: their names in the model; empty for a module given without one.
    """

    def __init__(self, module: nn.Module | Mapping[str, nn.Module], names: Mapping[int, str] | None = None) -> None:
        super().__init__()
        modules = dict(module) if isinstance(module, Mapping) else {"": module}
        self.paths = tuple(name for name in modules if name)
        self.module = next(iter(modules.values())) if len(modules) == 1 else nn.ModuleList(modules.values())
        self.names = dict(names or {})

    @property
    def modules_by_path(self) -> dict[str, nn.Module]:
        """The modules by their names in the model."""
        modules: Any = self.module if len(self.paths) > 1 else [self.module]
        return dict(zip(self.paths, modules, strict=True))

    @property
    def classes(self) -> int:
        """The number of source classes."""
        last = [m for m in self.module.modules() if isinstance(m, nn.Linear)]
        return len(self.names) or (last[-1].out_features if last else 0)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def forward(self, border: Border) -> Tensor:
        """Source logits (B, C_s), in float32 or wider: the model's forward from the border, with this head in place.

        Each module runs in the mode, training or evaluation, of the one in whose place it stands. Autocast is off.

        Raises:
            OptionError: if the model gives anything but one row of logits per sample.
        """
        prefix = unwrap(border.model)[1]
        modules = {f"{prefix}{path}": module for path, module in self.modules_by_path.items()}
        before = [name for name in modules if name not in border.head]
        if before:
            raise OptionError(
                f"the source head replaces {before[0]}, but the head begins at {', '.join(border.head)}: set head=... "
                f"to {', '.join(self.paths)}."
            )
        for name, module in modules.items():
            module.train(border.model.get_submodule(name).training)
        device = next(self.module.parameters()).device
        with torch.autocast(device.type, enabled=False):
            logits = border.forward(modules, self.dtype)
        if logits.dim() != 2:
            raise OptionError(
                f"with its pretrained head, {type(unwrap(border.model)[0]).__name__} returns logits "
                f"{tuple(logits.shape)}, not one row per sample. Strategies that keep the source head cannot be used "
                "with it."
            )
        return wide(logits)


def head_modules(model: nn.Module, head: str | None = None, blocks: str | None = None) -> Names:
    """The names of the head's modules that have parameters.

    Raises:
        OptionError: if there are none.
    """
    found = anatomy(model, head=head, blocks=blocks).head.modules
    names = tuple(name for name in found if has_parameters(model, name))
    if not names:
        raise OptionError(
            f"the head ({', '.join(found)}) has no module with parameters, so there is none to keep. Set the head with "
            "head='...', or use a strategy that does not need one."
        )
    return names


def head_module(model: nn.Module, head: str | None = None, blocks: str | None = None) -> str:
    """The name of the only module of the head that has parameters.

    Raises:
        OptionError: if there are several.
    """
    names = head_modules(model, head, blocks)
    if len(names) > 1:
        raise OptionError(
            f"the head consists of {len(names)} modules with parameters ({', '.join(names)}), so there is no single "
            "layer with its input. Name one with head='...', or use SOURCE_LOGITS."
        )
    return names[0]


def head_input(model: nn.Module, head: str | None = None, blocks: str | None = None) -> str:
    """The layer that holds the input of a head of one module."""
    return INPUT + head_module(model, head, blocks)


def border_head(model: nn.Module, head: Names = ()) -> Names:
    """The modules where the head begins, for a :class:`Border`: those that the attached source head replaces.

    Args:
        head: names of the head's modules, if no source head is attached.
    """
    if not has_source_head(model):
        return head
    return tuple(f"{unwrap(model)[1]}{path}" for path in attached_source_head(model).paths)


def pretrained_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits (B, C_s) of the attached source head, in evaluation mode and without gradient.

    Args:
        batch: keyword arguments of the model.
    """
    head = attached_source_head(model)
    with evaluating(model, head), torch.no_grad():
        border = run_to_head(model, border_head(model), batch)
        return head.to(next(model.parameters()).device)(border)


def attach_source_head(model: nn.Module, source_head: SourceHead) -> None:
    """Attach a pretrained head to a model, outside its module tree: it is neither saved nor trained with the model.

    Raises:
        OptionError: if the head has several modules and the source head does not name its own.
    """
    base, prefix = unwrap(model)
    if not source_head.paths:
        names = tuple(name.removeprefix(prefix) for name in head_modules(model))
        if len(names) > 1:
            raise OptionError(
                f"the model's head consists of {', '.join(names)}: create the source head with a dictionary of modules "
                "by these names."
            )
        source_head.paths = names
    base.__dict__[ATTRIBUTE] = source_head


def has_source_head(model: nn.Module) -> bool:
    return ATTRIBUTE in unwrap(model)[0].__dict__


def source_head(model: nn.Module) -> SourceHead:
    """A copy of the pretrained head attached to a model, to be trained.

    Raises:
        OptionError: if there is none.
    """
    return copy.deepcopy(attached_source_head(model)).requires_grad_()


def attached_source_head(model: nn.Module) -> SourceHead:
    """The pretrained head attached to a model itself.

    Raises:
        OptionError: if there is none.
    """
    require_source_head(model)
    return unwrap(model)[0].__dict__[ATTRIBUTE]


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
        head: name of the head, if it cannot be found automatically.

    Raises:
        OptionError: if the head has no modules with parameters.
    """
    old = {name: model.get_submodule(name) for name in head_modules(model, head)}
    config = copy.deepcopy(model.config)
    class_names = dict(config.id2label) if config.id2label else {}
    for key, value in labels.items():  # num_labels first, since it resets the class names
        setattr(config, key, value)
    with torch.device("meta"):
        fresh = type(model)(config)
    for name, module in old.items():
        example = next(module.parameters())
        new = fresh.get_submodule(name).to_empty(device=example.device)
        draw(fresh, new)
        put(model, name, new.to(example.dtype).train(module.training))
    for key, value in labels.items():
        setattr(model.config, key, value)
    if hasattr(model, "num_labels"):
        model.num_labels = model.config.num_labels
    attach_source_head(model, SourceHead(old, class_names))
