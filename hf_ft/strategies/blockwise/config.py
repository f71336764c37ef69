"""Block-wise fine-tuning: train the most salient block and the head; everything else stays frozen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from torch import nn

from hf_ft.core import (
    EVERYTHING,
    USUAL_RATE,
    Context,
    Findings,
    FittedRate,
    FTConfig,
    HeadRate,
    OptionError,
    Paper,
    Plan,
    Stage,
    State,
    advising,
    describe_head_rate,
    head_rates,
    measure_head_rate,
    option,
    register,
)
from hf_ft.core.compose import with_common_options
from hf_ft.core.plan import Surgery
from hf_ft.engine.adapters import PREFIX, adapter_targets, add_adapters
from hf_ft.engine.run import Run
from hf_ft.engine.set_up import start
from hf_ft.models.weight_layers import weight_layers
from hf_ft.strategies.blockwise.candidates import (
    SCHEMES,
    Candidate,
    baseline_candidates,
    candidates,
    find_candidate,
    last_quarter,
)
from hf_ft.strategies.blockwise.describe import describe_candidates
from hf_ft.strategies.blockwise.findings import block_findings
from hf_ft.strategies.blockwise.scores import BlockScores
from hf_ft.strategies.blockwise.search import BASELINES, MOST_DRAWS, STORAGE, BlockSearch


@register("blockwise")
@dataclass(frozen=True, kw_only=True)
class BlockwiseConfig(FTConfig):
    r"""Search for the block that matters most for the data, and train only that block and the head.

    Every candidate block :math:`b` of a scheme starts from the same weights :math:`w^0` and trains for a few epochs
    on part of the training samples; the candidates are ranked on the remaining ones:

    .. math:: b^* = \arg\max_b \; \mathrm{score}\big(\arg\min_{w_b, h} \mathrm{CE};\; w_{\bar b} = w^0_{\bar b}\big)

    ``block="last_quarter"`` selects the candidate of the last quarter nearest the output, without a search.
    """

    paper = Paper(
        "Barakat, Huang",
        "Enhancing Transfer Learning Reliability via Block-wise Fine-tuning",
        "ICMLA 2023, pp. 414-421",
        "https://sure.sunderland.ac.uk/id/eprint/16762",
        note="15 models on Oxford Flowers and Caltech 101: a block of the fourth quarter is usually best",
    )
    further_papers = (
        Paper(
            "Barakat, Huang",
            "Improving Reliability of Fine-tuning with Block-wise Optimisation",
            "arXiv 2023",
            "https://arxiv.org/abs/2301.06133",
            note="the four ways to form candidates; VGG16, MobileNets and ResNet50V2 on Tf_flower",
        ),
    )
    formula = "min CE over the weights of the head and of block b* alone; b* = the candidate best on held-out samples"
    recommended = USUAL_RATE
    tuned = {"head_lr": FittedRate()}
    kept = (STORAGE,)
    schemes: ClassVar[tuple[str, ...]] = SCHEMES
    describe = staticmethod(describe_candidates)
    cost = advising.WITH_A_SEARCH
    advice = {
        advising.GOOD_FEATURES_FEW_SAMPLES: 1,
        advising.ONE_PART_STANDS_OUT: 2,
        advising.NO_PART_STANDS_OUT: -1,
        advising.FEW_SAMPLES_PER_WEIGHT: 1,
    }

    block: str | int = option(
        "auto",
        "Block to train: 'auto' searches for it; 'last_quarter' is the last block; a name such as 'stage3', or an "
        "index from the input (-1: the last), selects a candidate; 'head' and 'all' are the baselines. `hf-ft blocks "
        "MODEL` lists the candidates.",
    )
    scheme: Literal["stage", "block", "layer", "top_layers", "segment", "window"] = option(
        "stage", "How to divide the network into candidates.", source="ours"
    )
    length: int = option(3, "Number of layers per window.", range="[1, inf)")
    top: int = option(5, "For 'top_layers': maximum number of top-ranked layers to combine.", range="[1, inf)")
    head_lr: HeadRate = option(
        "auto",
        "Learning rate of the head: 'auto' to fit it to the features, None to use that of the block.",
        range="(0, inf)",
    )
    tuner: PeftConfig | None = option(
        None,
        "A PEFT config, such as LoraConfig(r=8), to train adapters and norms in the block instead of its weights. On "
        'the command line as JSON: \'{"peft_type": "LORA", "r": 8}\'.',
    )
    search_epochs: int = option(5, "Training epochs per candidate.", range="[1, inf)")
    search_seeds: int | Literal["auto"] = option(
        "auto",
        "Training runs per candidate, each scored on different held-out samples; candidates are ranked by mean score. "
        "'auto': as many as it takes to score 200 samples, at most 4.",
        range="[1, inf)",
    )
    validation: float = option(
        0.25, "Fraction of the training samples held out to rank the candidates.", range="(0, 1)"
    )
    metric: str = option(
        "accuracy",
        "Metric to rank the candidates by: accuracy, balanced_accuracy, macro_f1, mse, mae or loss (losses and "
        "errors are minimised).",
    )
    halving: bool = option(
        False, "Prune poor candidates early (successive halving); False trains all of them to the end."
    )
    baselines: bool = option(True, "Also score the head alone and all layers as baselines.")
    storage: str | None = option(
        None,
        "Where to store the trials: a file *.db (SQLite) or *.log, an Optuna URL, or 'memory'; None for "
        "block_search.db in the output folder. Processes that share a storage share the search.",
        local=True,
    )

    def adds_adapters(self) -> bool:
        return self.tuner is not None

    def within(self, epochs: float, model: nn.Module) -> BlockwiseConfig:
        """A copy whose search fits into ``epochs``: no baselines, fewer draws and epochs per candidate."""
        found = candidates(model, self.scheme, length=self.length, head=self.head, blocks=self.blocks)
        layers = len(weight_layers(model, self.head, self.blocks))
        # What lies before a candidate is computed once.
        work = (1 - self.validation) * sum(1 - min(one.layers, default=0) / layers for one in found)
        seeds: int | Literal["auto"] = self.search_seeds
        if seeds == "auto" and (fitting := int(epochs / (work * self.search_epochs))) < MOST_DRAWS:
            seeds = max(1, fitting)
        draws = MOST_DRAWS if seeds == "auto" else seeds
        each = max(1, min(self.search_epochs, int(epochs / (work * draws))))
        return dataclasses.replace(self, search_epochs=each, search_seeds=seeds, baselines=False)

    def measures(self) -> bool:
        return self.block == "auto" or self.head_lr == "auto"

    def searches(self) -> bool:
        return self.block == "auto"

    def must_measure(self) -> bool:
        return self.block == "auto"

    def measure(self, model: nn.Module, context: Context) -> State:
        if self.block != "auto":
            self.chosen(model, State())  # rejects a block that does not exist
        info: dict[str, Any] = measure_head_rate(self, model, context)
        if self.block != "auto":
            return State(info=info)
        # The candidates of the search train with the same rate.
        scores = dataclasses.replace(self, head_lr=info.get("head_lr", self.head_lr)).search(model, context)
        return State(info={**info, "scores": scores.to_dict(), "block": dataclasses.asdict(scores.best.candidate)})

    def search(self, model: nn.Module, context: Context) -> BlockScores:
        """The search of ``block="auto"``: briefly train and score every candidate."""
        return BlockSearch(model, self, context).run()

    def plan(self, model: nn.Module, state: State) -> Plan:
        return self._plan(model, self.chosen(model, state), state)

    def example_plan(self, model: nn.Module) -> Plan:
        if self.block != "auto":
            return super().example_plan(model)
        place = {"head": self.head, "blocks": self.blocks}
        fitting = (c for c in candidates(model, self.scheme, length=self.length, **place) if self.adaptable(model, c))
        found = next(fitting, None)
        return Plan() if found is None else dataclasses.replace(self, block=found.name).example_plan(model)

    def chosen(self, model: nn.Module, state: State) -> Candidate:
        """The block to train.

        Raises:
            OptionError: if it does not exist (the message lists the existing ones), or the search has not run.
        """
        place = {"head": self.head, "blocks": self.blocks}
        if self.block == "auto":
            if "block" not in state.info:
                raise OptionError("BlockwiseConfig(block='auto') has no search result yet: pass a context, or states.")
            return _candidate(state.info["block"])
        if self.block in BASELINES:
            return baseline_candidates(model, **place)[str(self.block)]
        options = candidates(model, self.scheme, length=self.length, **place)
        return last_quarter(options) if self.block == "last_quarter" else find_candidate(options, self.block)

    def scores(self, state: State) -> BlockScores:
        """The scores from the search of ``block="auto"``."""
        return BlockScores.from_dict(state.info["scores"])

    def learned(self, state: State) -> str:
        if "scores" not in state.info:
            return describe_head_rate(state)
        verdict = "; ".join(f"{label}: {what}" for label, what in self.scores(state).verdict())
        chosen = (
            f"Chosen by a search with scheme `{self.scheme}`, {self.metric} on held-out training samples. {verdict}."
        )
        return f"{chosen} {describe_head_rate(state)}".strip()

    def findings(self, state: State) -> Findings:
        if "scores" not in state.info:
            return Findings(summary=self.learned(state))
        return block_findings(self.scores(state), self.learned(state))

    def start(self, model: nn.Module, candidate: Candidate) -> Run:
        """Prepare a model for training one candidate of the search."""
        return start((self,), model, self.plan_for(model, candidate), {})

    def plan_for(self, model: nn.Module, candidate: Candidate) -> Plan:
        """The complete plan for training one candidate."""
        return with_common_options((self,), [self._plan(model, candidate, State())], model)

    def adaptable(self, model: nn.Module, candidate: Candidate) -> bool:
        """Whether a candidate can be trained; with a tuner, some module in it must support an adapter."""
        if self.tuner is None:
            return True
        return bool(adapter_targets(model, candidate.modules, self.anatomy(model).head.modules, self.tuner))

    def _plan(self, model: nn.Module, candidate: Candidate, state: State) -> Plan:
        head = self.anatomy(model).head.modules
        trains = (*candidate.modules, *head)
        surgery: tuple[Surgery, ...] = ()
        if self.tuner is not None and candidate.modules:
            surgery = (add_adapters(model, candidate.modules, head, self.tuner),)
            # Everything PEFT leaves trainable: adapters, norms and head, under their PEFT names.
            head, trains = tuple(PREFIX + name for name in head), EVERYTHING
        rates = head_rates(self, head, state)
        return Plan(surgery=surgery, stages=(Stage(candidate.name, trains=trains, rates=rates),))


def _candidate(content: dict[str, Any]) -> Candidate:
    fields = {**content, "modules": tuple(content["modules"]), "layers": tuple(content["layers"])}
    return Candidate(**fields)
