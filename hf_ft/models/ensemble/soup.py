"""Model soup: the mean of several models' weights in one model (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_ft.errors import OptionError
from hf_ft.models.soup import mean_weights


@torch.no_grad()
def soup(
    members: Iterable[Any], ancestors: Sequence[str | None], *, same_ancestor: bool | None = None
) -> PreTrainedModel:
    r"""Average several models into one plain model, with :math:`\theta = \frac{1}{N} \sum_j \theta_j`.

    This can work for members fine-tuned from the same pretrained weights. It may work less well if their heads were
    initialised differently, so compare its score with the ensemble's. BatchNorm statistics are also averaged and
    then fit no data: ``torch.optim.swa_utils.update_bn`` re-estimates them, layer by layer.

    Args:
        members: models of one class; left unchanged.
        ancestors: for each, the public name of the model it was fine-tuned from, if known.
        same_ancestor: True to proceed when the members' common ancestor is not on record.

    Returns:
        A new model of the members' class in eval mode. The mean is taken in float64; integer buffers are copied from
        the first member.

    Raises:
        OptionError: if members differ in class, shapes or ancestor.
    """
    members = list(members)
    _check_ancestors(ancestors, same_ancestor)
    _check_classes(members)
    first, mean = members[0], mean_weights([member.state_dict() for member in members])
    config = copy.deepcopy(first.config)
    config.name_or_path = ancestors[0] or ""
    with torch.random.fork_rng(devices=[]):
        average = type(first)(config).to(device=first.device, dtype=first.dtype)
    average.load_state_dict(mean, strict=True)
    for parameter, original in zip(average.parameters(), first.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return average.eval()


def _check_ancestors(ancestors: Sequence[str | None], same_ancestor: bool | None) -> None:
    common = len(ancestors) == 1 or (None not in ancestors and len(set(ancestors)) == 1)
    if common if same_ancestor is None else same_ancestor:
        return
    raise OptionError(
        f"the members descend from {', '.join(name or 'an unknown model' for name in ancestors)}: averaging weights is "
        "only meaningful if all were fine-tuned from the same ones. If they were, pass same_ancestor=True."
    )


def _check_classes(members: list[Any]) -> None:
    first = members[0]
    shapes = {name: tensor.shape for name, tensor in first.state_dict().items()}
    for index, member in enumerate(members):
        if type(member) is not type(first):
            raise OptionError(
                f"member 0 is a {type(first).__name__}, but member {index} is a {type(member).__name__}: only members "
                "of the same class can be averaged."
            )
        own = {name: tensor.shape for name, tensor in member.state_dict().items()}
        odd = next((name for name in {**shapes, **own} if shapes.get(name) != own.get(name)), None)
        if odd is not None:
            sizes = [None if part is None else tuple(part) for part in (shapes.get(odd), own.get(odd))]
            raise OptionError(
                f"{odd} is {sizes[0]} in member 0, but {sizes[1]} in member {index}: only members of equal shapes can "
                "be averaged."
            )
