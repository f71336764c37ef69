"""DAFT: BatchNorm converted to the target's statistics, and a zero-initialised head with its own learning rate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from hf_ft.core import (
    LARGEST,
    Context,
    FittedRate,
    FTConfig,
    HeadRate,
    LearningRate,
    Names,
    Needs,
    OptionError,
    Paper,
    Plan,
    Recommended,
    State,
    advising,
    check_tensor,
    describe_head_rate,
    head_rates,
    measure_head_rate,
    option,
    register,
)
from hf_ft.core.plan import Surgery
from hf_ft.models import BatchNormStatistics, batch_norms, convert_batch_norm, estimate_batch_norm
from hf_ft.models.head_layers import adapter_around, logit_layers


@dataclass(frozen=True)
class ConvertBatchNorm:
    """Surgery: convert the named layers to the target's statistics without changing the model's function."""

    names: Names
    # Excluded from comparison: the truth value of a tensor is ambiguous.
    statistics: tuple[BatchNormStatistics, ...] = field(compare=False, repr=False)

    def __call__(self, model: nn.Module) -> nn.Module:
        return convert_batch_norm(model, dict(zip(self.names, self.statistics, strict=True)))


@dataclass(frozen=True)
class ZeroHead:
    """Surgery: set weight and bias of the layers ``sets`` to zero."""

    sets: Names

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        for name in self.sets:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.zero_()
        return model


def zeroed_layers(model: nn.Module, head: Names) -> Names:
    """The layers of a head to set to zero: those that produce the logits.

    Raises:
        OptionError: if no layer of the head is trainable, or it carries an adapter.
    """
    layers = logit_layers(model, head)
    if not layers:
        raise OptionError(
            f"zero_head: no layer of the head ({', '.join(head)}) is trainable. Unfreeze one, or set zero_head=False."
        )
    if adapter_around(model, layers[-1]):
        raise OptionError(
            f"zero_head: the head ({layers[-1]}) carries an adapter, and its own weight is frozen. Train the whole "
            "head (modules_to_save), or set zero_head=False."
        )
    return layers


NO_BATCH_NORM = advising.Rule(
    (("batch_norm_layers", "<", 1),),
    "the model has no BatchNorm to convert ({batch_norm_layers:.0f} layers): daft.convert_batch_norm=False keeps the "
    "rest of the method",
    source="",
)


@register("daft")
@dataclass(frozen=True, kw_only=True)
class DAFTConfig(FTConfig):
    r"""Convert BatchNorm to the target's statistics, then train from a zero head with a learning rate of its own.

    .. math::
        \beta' = \beta + \gamma (\mu_t - \mu_s) / \sqrt{v_s + \epsilon} \qquad
        \gamma' = \gamma \sqrt{v_t + \epsilon} / \sqrt{v_s + \epsilon} \qquad
        h = 0, \; \eta_h \gg \eta_f

    The pretrained network in train mode then starts close to its function in eval mode. A zero head propagates no
    gradient to the backbone at first; the gradient grows as the head is fitted.
    """

    paper = Paper(
        "Ha, Jeong, Lee",
        "Domain-Aware Fine-Tuning: Enhancing Neural Network Adaptability",
        "AAAI 2024",
        "https://arxiv.org/abs/2308.07728",
    )
    formula = (
        "beta' = beta + gamma (mu_t - mu_s) / sqrt(v_s + eps);  gamma' = gamma sqrt(v_t + eps) / sqrt(v_s + eps);  "
        "head = 0;  lr_head >> lr_backbone"
    )
    # The authors use SGD; AdamW scored higher on all tasks of tests/benchmarks/rates.py.
    recommended = {
        "learning_rate": LearningRate(2e-4, sgd=2e-3, without_batch_norm=0.1),
        "lr_scheduler_type": Recommended("cosine", "code"),
        "weight_decay": Recommended(0.0, "code"),
    }
    tuned = {"head_lr": FittedRate()}
    cost = advising.WITH_A_PASS_BEFORE
    advice = {
        advising.POOR_FEATURES: 2,
        advising.POOR_FEATURES_FEW_SAMPLES: 1,
        advising.SHIFTED_MEANS: 3,
        advising.OTHER_SPREADS: 1,
        advising.SAME_MEANS: -1,
        NO_BATCH_NORM: None,
    }

    convert_batch_norm: bool = option(
        True,
        "Convert BatchNorm layers to the training data's statistics without changing the model's function.",
        source="code",
    )
    statistics: Literal["batch", "pooled"] = option(
        "batch",
        "Variance to measure: 'batch' averages the variances within batches, 'pooled' is the variance of all values.",
        source="code",
    )
    zero_head: bool = option(True, "Initialise the output layer of the head to zero.", source="code")
    head_lr: HeadRate = option(
        "auto",
        "Learning rate of the head (the authors try 10, 3, 1, 0.3 and 0.1); 'auto' to fit it to the features, None to "
        "use that of the backbone.",
        range="(0, inf)",
    )

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def check_beside(self, others: tuple[FTConfig, ...]) -> None:
        names = ", ".join(other.ft_type for other in others if other.adds_adapters())
        if names:
            raise OptionError(
                f"daft changes layers of the model, and {names} adds adapters to them, which are saved without these "
                "layers: use one of them."
            )

    def adapted(self, model: nn.Module) -> DAFTConfig:
        """For models without BatchNorm, the other half of the method: a zero head and two learning rates."""
        return self if batch_norms(model) else dataclasses.replace(self, convert_batch_norm=False)

    def needs_batch_statistics(self) -> bool:
        return self.convert_batch_norm

    def example_plan(self, model: nn.Module) -> Plan:
        return FTConfig.example_plan(dataclasses.replace(self, convert_batch_norm=False), model)

    def measures(self) -> bool:
        return self.convert_batch_norm or self.head_lr == "auto"

    def must_measure(self) -> bool:
        return self.convert_batch_norm

    def measure(self, model: nn.Module, context: Context) -> State:
        statistics = self._statistics(model, context) if self.convert_batch_norm else {}
        return State(statistics, measure_head_rate(self, model, context))

    def _statistics(self, model: nn.Module, context: Context) -> dict[str, Tensor]:
        layers = estimate_batch_norm(model, context.batches(), self.statistics, context.reduce)
        _check_saved_by_peft(model, layers)
        tensors = {f"{name}.mean": statistics.mean.cpu() for name, statistics in layers.items()}
        return tensors | {f"{name}.var": statistics.var.cpu() for name, statistics in layers.items()}

    def check_state(self, model: nn.Module, state: State) -> None:
        super().check_state(model, state)
        for name, tensor in state.tensors.items():
            check_tensor(name, tensor, least=0 if name.endswith(".var") else -LARGEST, most=LARGEST)

    def learned(self, state: State) -> str:
        layers = sum(name.endswith(".mean") for name in state.tensors)
        converted = f"{layers} BatchNorm layers were converted to the statistics of the training data."
        return " ".join(filter(None, (converted if layers else "", describe_head_rate(state))))

    def plan(self, model: nn.Module, state: State) -> Plan:
        head = self.anatomy(model).head.modules
        surgery: list[Surgery] = []
        if self.convert_batch_norm:
            surgery.append(_conversion(state))
        if self.zero_head:
            surgery.append(ZeroHead(zeroed_layers(model, head)))
        return Plan(surgery=tuple(surgery), rates=head_rates(self, head, state))


def _conversion(state: State) -> ConvertBatchNorm:
    names = tuple(key.removesuffix(".mean") for key in state.tensors if key.endswith(".mean"))
    if not names:
        raise OptionError(
            "daft: the state holds no BatchNorm statistics. Measure first (pass a context to set_up), or set "
            "convert_batch_norm=False."
        )
    return ConvertBatchNorm(
        names, tuple(BatchNormStatistics(state.tensors[f"{n}.mean"], state.tensors[f"{n}.var"]) for n in names)
    )


def _check_saved_by_peft(model: nn.Module, names: dict[str, BatchNormStatistics]) -> None:
    """Reject adapters over converted layers: an adapter is saved without its base layers, and they would be lost."""
    lost = [name for name in names if not all(p.requires_grad for p in model.get_submodule(name).parameters())]
    if lost and hasattr(model, "peft_config"):
        raise OptionError(
            f"convert_batch_norm changes {len(lost)} layers, such as {lost[0]!r}, that the PEFT adapter does not save. "
            "Add them to modules_to_save, or set convert_batch_norm=False."
        )
