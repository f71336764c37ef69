"""The methods of PEFT: train adapters and the head, and merge them into the weights afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from hf_ft.core import (
    EVERYTHING,
    Choice,
    FittedHead,
    HeadRate,
    LearningRate,
    Names,
    Needs,
    OptionError,
    Paper,
    Plan,
    Stage,
    State,
    advising,
    head_rates,
    option,
    register,
)
from hf_ft.engine.adapters import PREFIX, add_adapters, merge_adapters
from hf_ft.errors import AnatomyError
from hf_ft.models.names import covered


def _holders(model: nn.Module, head: Names) -> Names:
    """The modules of the head that hold its weights: some tuners of PEFT cannot restore a container."""
    inner = [(name, module) for name, module in model.named_modules() if covered(name, set(head))]
    return tuple(name for name, module in inner if next(module.parameters(recurse=False), None) is not None)


@register("peft")
@dataclass(frozen=True, kw_only=True)
class PEFTConfig(FittedHead):
    r"""Train adapters in the blocks and the head; all other weights stay as pretrained.

    With the default tuner, LoRA, every linear layer and ungrouped convolution :math:`W` of the blocks becomes

    .. math:: W^0 + \frac{\alpha}{r} B A, \qquad A \in \mathbb{R}^{r \times d}, \; B \in \mathbb{R}^{k \times r}

    with :math:`\alpha = 2 r` and :math:`B = 0` at the start. Any other config of PEFT (DoRA, IA3, VeRA, LN tuning, ...)
    can be used instead.
    """

    paper = Paper(
        "Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "ICLR 2022",
        "https://arxiv.org/abs/2106.09685",
        "the default tuner",
    )
    formula = "W = W0 + alpha / r * B A in the blocks (LoRA), or any other tuner of PEFT; W0 stays"
    # The layers that are adapted keep their statistics, as if there were no BatchNorm.
    recommended = {"learning_rate": LearningRate(1e-3, sgd=1e-2, warm_up=True)}
    tuned = {"rank": Choice((4, 8, 16))}
    cost = advising.EVERYTHING + advising.DEARER
    advice = {advising.FEW_SAMPLES_PER_WEIGHT: 1, advising.POOR_FEATURES: -1}

    tuner: PeftConfig | None = option(
        None,
        "A PEFT config; None for LoRA in all blocks. Without `target_modules`, it adapts every module of the blocks "
        'that it can. On the command line as JSON: \'{"peft_type": "IA3", "feedforward_modules": []}\'.',
    )
    rank: int = option(8, "Rank of LoRA, if `tuner` is None.", range="[1, inf)")
    norms: bool = option(False, "Train the blocks' normalisation layers as well.")
    merge: bool = option(
        True,
        "Merge the adapters into the weights after training, so that the model is a plain Transformers checkpoint. If "
        "not, it stays a PEFT model, and is saved as an adapter.",
    )
    head_lr: HeadRate = option(
        "auto",
        "Learning rate of the head: 'auto' to fit it to the features, None to use that of the adapters.",
        range="(0, inf)",
    )

    def adds_adapters(self) -> bool:
        return True

    def keeps_adapters(self) -> bool:
        return not self.merge

    def needs(self) -> Needs:
        return Needs(sharded=not self.merge)  # the merged model is a different one, without shards

    def plan(self, model: nn.Module, state: State) -> Plan:
        head = _holders(model, self.anatomy(model).head.modules)
        tuner = self.tuner or LoraConfig(r=self.rank, lora_alpha=2 * self.rank)
        surgery = add_adapters(model, self._inside(model, tuner), head, tuner, with_norms=self.norms)
        rates = head_rates(self, tuple(PREFIX + name for name in head), state)
        return Plan(
            surgery=(surgery,),
            stages=(Stage("adapters", trains=EVERYTHING, rates=rates),),  # all that PEFT leaves trainable
            finalise=(merge_adapters,) if self.merge else (),
        )

    def check_model(self, model: nn.Module) -> None:
        if isinstance(model, PeftModel):
            raise OptionError(
                "peft: the model is already a PEFT model, whose adapters any strategy trains: use FullConfig, or pass "
                "the base model."
            )

    def _inside(self, model: nn.Module, tuner: PeftConfig) -> Names:
        """The blocks; everything but the head where the tuner names its targets, or the blocks are unknown."""
        anatomy = self.anatomy(model)
        try:
            parts = anatomy.parts[:-1] if getattr(tuner, "target_modules", None) else anatomy.blocks
        except AnatomyError:
            parts = (anatomy.rest,)
        return tuple(name for part in parts for name in part.modules)
