"""Gradual unfreezing with discriminative learning rates (ULMFiT): from the head down, one group of blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    Choice,
    FTConfig,
    LearningRate,
    Names,
    Needs,
    OptionError,
    Paper,
    Plan,
    Rate,
    Stage,
    State,
    advising,
    option,
    register,
)


def unfreezing_groups(parts: tuple[Names, ...], groups: int) -> list[Names]:
    """Split parts in forward order into contiguous groups of about equal size, the last parts first.

    Raises:
        OptionError: if there are more groups than parts.
    """
    if groups > len(parts):
        raise OptionError(
            f"GradualUnfreezingConfig.stages={groups + 1} is too many for this model, which has a head and "
            f"{len(parts)} other parts: use 2 to {len(parts) + 1}."
        )
    borders = [round(i * len(parts) / groups) for i in range(groups + 1)]
    runs = [parts[low:high] for low, high in zip(borders, borders[1:], strict=False)]
    return [tuple(name for part in run for name in part) for run in reversed(runs)]


@register("gradual_unfreezing")
@dataclass(frozen=True, kw_only=True)
class GradualUnfreezingConfig(FTConfig):
    r"""Train the head first, then unfreeze the blocks from the top down, lower ones at lower rates.

    Group :math:`g`, counted from the top (head: 0), trains from stage :math:`g` on with learning rate

    .. math:: \eta_g = \eta / d^{\,g}

    where :math:`d` is ``decay``. The first stage trains the head alone; the remaining parts are split into
    ``stages - 1`` groups.
    """

    paper = Paper(
        "Howard, Ruder",
        "Universal Language Model Fine-tuning for Text Classification",
        "ACL 2018",
        "https://arxiv.org/abs/1801.06146",
    )
    formula = "group g from the top trains from stage g on, at lr / decay^g"
    recommended = {"learning_rate": LearningRate(1e-3, sgd=1e-2, without_batch_norm=0.1)}
    tuned = {"decay": Choice((1.0, 1.6, 2.6))}
    cost = advising.PART_OF_THE_RUN + advising.DEARER  # the head-only stage is shorter
    advice = {
        advising.GOOD_FEATURES_FEW_SAMPLES: 1,
        advising.FAIR_FEATURES: 1,
        advising.LOW_GRADIENT: -1,
        advising.HIGH_GRADIENT: 1,
    }

    stages: int = option(4, "Number of stages, including that of the head; all are equally long.", range="[2, inf)")
    decay: float = option(2.6, "Ratio of the learning rates of neighbouring groups.", range="[1, inf)", source="paper")
    fresh_optimizer: bool = option(
        True, "Start each stage without the momentum of the stages before.", source="code", formerly=False
    )

    def needs(self) -> Needs:
        return Needs(sharded=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        anatomy = self.anatomy(model)
        body = tuple(part.modules for part in anatomy.parts if part.name != "head")
        groups = [anatomy.head.modules, *unfreezing_groups(body, self.stages - 1)]
        rates = tuple(Rate(group, scale=self.decay**-g) for g, group in enumerate(groups))
        return Plan(
            stages=tuple(
                Stage(
                    f"unfreeze{i}",
                    trains=tuple(name for group in groups[: i + 1] for name in group),
                    duration=1 / self.stages,
                    rates=rates[: i + 1],
                    fresh_optimizer=self.fresh_optimizer,
                )
                for i in range(self.stages)
            )
        )
