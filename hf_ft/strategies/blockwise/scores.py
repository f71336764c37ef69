"""Results of a block search: a score per candidate and seed, the baselines, and the best candidate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_ft.errors import OptionError
from hf_ft.records import restored
from hf_ft.strategies.blockwise.candidates import Candidate, last_quarter

HEADERS = ("candidate", "quarter", "layers", "parameters", "score", "epochs", "seconds", "note")


@dataclass(frozen=True)
class BlockScore:
    """The validation score of one candidate.

    Attributes:
        candidate: the layers trained together with the head.
        scores: one per seed run, higher is better; not finite if training diverged.
        pruned: whether it was stopped early, so that its scores are not those of complete runs.
        epochs: number of epochs trained, over all seeds.
        seconds: training time.
    """

    candidate: Candidate
    scores: tuple[float, ...]
    pruned: bool = False
    epochs: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.scores:
            raise OptionError(f"{self.candidate.name} has no score: one per seed is needed.")

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        r"""Standard deviation over the seeds, :math:`\sqrt{\sum_i (s_i - \bar s)^2 / (n - 1)}`; None with one seed."""
        if len(self.scores) < 2:
            return None
        return statistics.stdev(self.scores) if all(map(math.isfinite, self.scores)) else math.nan

    @property
    def ranks(self) -> bool:
        """Whether it can be the best: neither pruned nor diverged."""
        return not self.pruned and math.isfinite(self.mean)

    def shown(self) -> str:
        """The mean as text, with the standard deviation if there are several seeds."""
        return f"{self.mean:.3f}" + ("" if self.std is None else f" ± {self.std:.3f}")


@dataclass(frozen=True)
class BlockScores:
    """The result of a search over the candidates of one scheme.

    Attributes:
        scheme: one of :data:`hf_ft.strategies.blockwise.candidates.SCHEMES`.
        metric: metric of the scores; higher is better.
        layers: number of layers of the network.
        seeds: seeds of each candidate's runs.
        scores: one entry per candidate, in search order (from the output to the input).
        baselines: scores by name: ``head`` (the classifier only) and ``all`` (all layers).
    """

    scheme: str
    metric: str
    layers: int
    seeds: tuple[int, ...]
    scores: tuple[BlockScore, ...]
    baselines: Mapping[str, BlockScore] = field(default_factory=dict)

    @property
    def best(self) -> BlockScore:
        """The highest mean among unpruned candidates; ties go to the one nearest the output.

        Raises:
            OptionError: if all are pruned or diverged.
        """
        best = _best(self.scores)
        if best is None:
            raise OptionError(
                "no candidate was trained to the end with a finite score: lower the learning rate, or prune later."
            )
        return best

    def best_in(self, quarter: int) -> BlockScore | None:
        """The best candidate with its centre in the given quarter of the depth (1 to 4), if any."""
        return _best(score for score in self.scores if score.candidate.quarter == quarter)

    @property
    def last_quarter(self) -> BlockScore:
        """Score of the last block of the fourth quarter, the choice without a search; it may be pruned."""
        chosen = last_quarter(score.candidate for score in self.scores)
        return next(score for score in self.scores if score.candidate == chosen)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dictionary, with null for non-finite scores."""
        return {
            "scheme": self.scheme,
            "metric": self.metric,
            "layers": self.layers,
            "seeds": list(self.seeds),
            "scores": [_to_dict(score) for score in self.scores],
            "baselines": {name: _to_dict(score) for name, score in self.baselines.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BlockScores:
        """Read the output of :meth:`to_dict`.

        Raises:
            CheckpointError: if a field is missing or of another type; the message names it.
        """
        return restored(cls, content, "block scores", null=math.nan, complete=True)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers and one row of text per candidate, then per baseline."""
        best = _best(self.scores)
        rows = [_row(score, "best" if score is best else "") for score in self.scores]
        return HEADERS, rows + [_row(score, "baseline") for score in self.baselines.values()]

    def verdict(self) -> list[tuple[str, str]]:
        """Conclusions of the search, as pairs of a label and a candidate with its score."""
        best, in_last = _best(self.scores), self.best_in(4)
        entries = [("best", best), ("best in the fourth quarter", in_last)]
        entries += [("last of the fourth quarter, without search", self.last_quarter)] if self.scores else []
        names = {"head": "head only", "all": "all layers"}
        entries += [(names.get(name, name), score) for name, score in self.baselines.items()]
        return [(label, "none" if score is None else _named(score)) for label, score in entries]

    def markdown(self) -> str:
        """The table and the verdict as Markdown."""
        headers, rows = self.table()
        lines = ["| " + " | ".join(cells) + " |" for cells in (headers, ("---",) * len(headers), *rows)]
        several = f"mean ± std of {len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed"
        about = f"Scheme `{self.scheme}`, {self.layers} layers; score: {self.metric}, {several}."
        return "\n".join([about, "", *lines, "", *(f"- {label}: {text}" for label, text in self.verdict()), ""])


def _best(scores: Iterable[BlockScore]) -> BlockScore | None:
    ranked = [score for score in scores if score.ranks]
    return max(ranked, key=lambda score: (score.mean, score.candidate.centre), default=None)


def _named(score: BlockScore) -> str:
    candidate = score.candidate
    remark = f", quarter {candidate.quarter}" if candidate.quarter and candidate.name != "all" else ""
    return f"{candidate.name}, {score.shown()}{remark}{', pruned' if score.pruned else ''}"


def _row(score: BlockScore, note: str) -> tuple[str, ...]:
    candidate = score.candidate
    quarter = f"Q{candidate.quarter}" if candidate.quarter and note != "baseline" else ""
    notes = [note, "pruned" if score.pruned else "", "" if math.isfinite(score.mean) else "diverged"]
    return (
        candidate.name,
        quarter,
        layers_shown(candidate.layers),
        f"{candidate.parameters:,}",
        score.shown(),
        str(score.epochs),
        f"{score.seconds:.0f}",
        ", ".join(filter(None, notes)),
    )


def layers_shown(layers: tuple[int, ...]) -> str:
    """Compact layer indices: ``5-7``, ``3``, ``0, 4, 9`` if scattered, ``-`` for none."""
    if not layers:
        return "-"
    if len(layers) > 1 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def _to_dict(score: BlockScore) -> dict[str, Any]:
    content = asdict(score)
    for name in ("modules", "layers"):
        content["candidate"][name] = list(content["candidate"][name])
    content["scores"] = [_number(value) for value in score.scores]
    # For readers of the file; recomputed on loading.
    return content | {"mean": _number(score.mean), "std": _number(score.std)}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
