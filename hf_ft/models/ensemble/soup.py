"""Model soup: one model with the mean of several models' weights (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ft.errors import OptionError


@torch.no_grad()
def soup(
    members: Iterable[Any], ancestors: Sequence[str | None], *, same_ancestor: bool | None = None
) -> PreTrainedModel:
    r"""One plain model from several, with :math:`\theta = \frac{1}{N} \sum_j \theta_j`.

    This can work for members that were fine-tuned from the same pretrained weights. It may work less well where their
    heads began at different random values, so compare its score with the ensemble's. The statistics of BatchNorm are
    averaged, too, and fit no data: ``torch.optim.swa_utils.update_bn`` measures them anew, layer upon layer.

    Args:
        members: models of one class; left as they are.
        ancestors: for each, the public name of what it was fine-tuned from, where that is known.
        same_ancestor: True, to go on where the members' common ancestor is not on record.

    Returns:
        A new model of the members' class in eval mode. The mean is taken in float64; buffers of integers are those of
        the first member.

    Raises:
        OptionError: members of several classes, shapes or ancestors.
    """
    members = list(members)
    _check_ancestors(ancestors, same_ancestor)
    _check_classes(members)
    states = [member.state_dict() for member in members]
    first = members[0]
    mean = {name: _mean([state[name] for state in states]) for name in states[0]}
    config = copy.deepcopy(first.config)
    config.name_or_path = ancestors[0] or ""
    with torch.random.fork_rng(devices=[]):
        made = type(first)(config).to(device=first.device, dtype=first.dtype)
    made.load_state_dict(mean, strict=True)
    for parameter, known in zip(made.parameters(), first.parameters(), strict=True):
        parameter.requires_grad_(known.requires_grad)
    return made.eval()


def _mean(tensors: list[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack([tensor.double() for tensor in tensors]).mean(dim=0).to(tensors[0].dtype)


def _check_ancestors(ancestors: Sequence[str | None], same_ancestor: bool | None) -> None:
    common = len(ancestors) == 1 or (None not in ancestors and len(set(ancestors)) == 1)
    if common if same_ancestor is None else same_ancestor:
        return
    raise OptionError(
        f"the members descend from {', '.join(name or 'an unknown model' for name in ancestors)}: the mean of weights "
        "has a meaning only where all were fine-tuned from the same ones. If they were, pass same_ancestor=True."
    )


def _check_classes(members: list[Any]) -> None:
    first = members[0]
    shapes = {name: tensor.shape for name, tensor in first.state_dict().items()}
    for index, member in enumerate(members):
        if type(member) is not type(first):
            raise OptionError(
                f"member 0 is a {type(first).__name__}, member {index} a {type(member).__name__}: only members of one "
                "class have a mean."
            )
        own = {name: tensor.shape for name, tensor in member.state_dict().items()}
        odd = next((name for name in {**shapes, **own} if shapes.get(name) != own.get(name)), None)
        if odd is not None:
            sizes = [None if part is None else tuple(part) for part in (shapes.get(odd), own.get(odd))]
            raise OptionError(
                f"{odd} is {sizes[0]} in member 0 and {sizes[1]} in member {index}: only members of equal shapes have "
                "a mean."
            )
