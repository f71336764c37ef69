"""Your own strategy in one file, checked against the same laws as the built-in ones.

It trains all parameters and keeps the norms of the features near their mean at the start of training.

    python examples/own_strategy.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ft.core import Context, FTConfig, Plan, State, Term, View, option, register
from hf_ft.testing import check_strategy, tiny_resnet, train


@dataclass(frozen=True)
class NormGap:
    """Mean squared difference of the features' norms from a target."""

    target: float

    def __call__(self, view: View) -> Tensor:
        return (view.features.float().flatten(1).norm(dim=1) - self.target).square().mean()


@register("feature_norm")
@dataclass(frozen=True, kw_only=True)
class FeatureNormConfig(FTConfig):
    r"""Keep the features' norm: :math:`L = CE + \lambda\, \mathrm{mean}_i (\lVert f(x_i) \rVert - \nu)^2`."""

    weight: float = option(0.01, "Weight of the penalty.", range="[0, inf)")

    def measure(self, model: nn.Module, context: Context) -> State:
        """Compute the mean norm over the training data, once; it is saved with the model."""
        norms: list[Tensor] = []
        head = model.get_submodule(self.anatomy(model).head.modules[0])
        hook = head.register_forward_pre_hook(lambda m, inputs: norms.append(inputs[0].flatten(1).norm(dim=1)))
        with torch.no_grad():
            for batch in context.batches():
                model.eval()(**batch)
        hook.remove()
        total = context.reduce(torch.cat(norms).sum()) / context.reduce(torch.tensor(float(len(torch.cat(norms)))))
        return State(tensors={"norm": total})

    def plan(self, model: nn.Module, state: State) -> Plan:
        gap = NormGap(float(state.tensors["norm"]))
        return Plan(terms=(Term("feature_norm", gap, weight=self.weight, needs=frozenset({"features"})),))


if __name__ == "__main__":
    check_strategy(FeatureNormConfig())
    trainer = train(tiny_resnet(), [FeatureNormConfig(weight=0.1), "l2_sp"], "runs/own_strategy")
    print({key: value for key, value in trainer.state.log_history[-2].items() if key.startswith("loss")})
