"""``hf-ft blocks``: a model as the strategies see it."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence

from torch import nn

from hf_ft.cli.console import Parser, say, table
from hf_ft.cli.models import skeleton
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.norms import batch_norms, norm_layers, tensorflow_momentum
from hf_ft.models.parts import Anatomy, Part
from hf_ft.models.weight_layers import weight_layers
from hf_ft.strategies.blockwise.candidates import SCHEMES, candidates, last_quarter
from hf_ft.strategies.blockwise.scores import layers_shown
from hf_ft.zoo.models import SHORT_NAMES

EPILOG = """--scheme shows what block-wise fine-tuning may adapt beside the head, nearest the output first:
  layer     each layer alone: a convolution, linear layer or embedding with the norm that follows it
  segment   the layers between two poolings or activations
  window    every run of --length consecutive layers
  stage     the architecture's own stages, in a plain transformer each block; and the stem
  block     each block by itself; the stem, and the neck where it holds layers
top_layers, the best layers together, needs the scores of a search by layer. The quarter is that of a candidate's
centre in the depth: the paper finds the best block in the fourth mostly (Barakat and Huang, arXiv:2301.06133).

example:
  hf-ft blocks microsoft/resnet-18
  hf-ft blocks microsoft/resnet-18 --scheme window --length 3
  hf-ft blocks my_model/ --head classifier --blocks 'encoder\\.layer\\.\\d+'"""


def run_blocks(arguments: list[str]) -> None:
    """Print the parts of a model, its stages, and its normalisation layers; or its candidates for adaptation."""
    flags = _parser().parse_args(arguments)
    if flags.length is not None and flags.scheme != "window":
        raise OptionError("--length is the number of layers of a window: add --scheme window.")
    if flags.scheme is not None and flags.scheme not in SCHEMES:  # before weights are read
        raise OptionError(f"--scheme {flags.scheme} is unknown. There are: {', '.join(SCHEMES)}.")
    model = skeleton(flags.model)
    if flags.scheme is None:
        say(report(model, anatomy(model, head=flags.head, blocks=flags.blocks)))
    else:
        say(candidate_report(model, flags))


def _parser() -> Parser:
    parser = Parser(
        prog="hf-ft blocks",
        description="Show what a model is made of, as strategies see it: parts in forward order, stages, norms.",
        epilog=EPILOG,
    )
    known = ", ".join(SHORT_NAMES)
    parser.add_argument("model", help=f"a Hub id, a folder, or one of {known}")
    parser.add_argument("--head", help="the head's module names, separated by commas, instead of what is found")
    parser.add_argument("--blocks", help="regular expression of whole block names, instead of what is known")
    shown = ", ".join(name for name in SCHEMES if name != "top_layers")
    parser.add_argument("--scheme", help=f"show the candidates for adaptation instead: {shown}")
    parser.add_argument("--length", type=int, help="layers of a window (default: 3)")
    return parser


def candidate_report(model: nn.Module, flags: argparse.Namespace) -> str:
    """The text that `hf-ft blocks --scheme` prints."""
    where = {"head": flags.head, "blocks": flags.blocks}
    length = 3 if flags.length is None else flags.length
    found = candidates(model, flags.scheme, length=length, **where)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        (
            candidate.name,
            f"Q{candidate.quarter}",
            layers_shown(candidate.layers),
            f"{candidate.parameters:,}",
            f"{candidate.parameters / max(1, total):.1%}",
            _shortened(candidate.modules),
        )
        for candidate in found
    ]
    layers, chosen = weight_layers(model, **where), last_quarter(found)
    remark = "the last of the fourth quarter" if chosen.quarter == 4 else "the last; none has its centre in the fourth"
    facts = [
        ("head", "trains with every candidate: " + ", ".join(anatomy(model, **where).head.modules)),
        ("no search", f"{chosen.name}, {remark}"),
    ]
    title = (
        f"{type(model).__name__}: {total:,} parameters, {len(layers)} layers outside the head; {len(found)} "
        f"{'candidate' if len(found) == 1 else 'candidates'} by {flags.scheme}, from the output end"
    )
    headers = ("candidate", "quarter", "layers", "parameters", "share", "modules")
    return "\n".join([title, "", table(rows, headers), "", table(facts)])


def _shortened(modules: Sequence[str]) -> str:
    """Module names with what they have in common once: ``encoder.layers.{0, 1}``; of many, the first and the last."""
    if len(modules) == 1:
        return modules[0]
    common = os.path.commonprefix([name.rpartition(".")[0] + "." for name in modules]).rpartition(".")[0]
    tails = [name[len(common) + 1 :] if common else name for name in modules]
    if len(tails) > 3:
        tails = [tails[0], "...", tails[-1]]
    return f"{common}.{{{', '.join(tails)}}}" if common else ", ".join(tails)


def report(model: nn.Module, found: Anatomy) -> str:
    """The text that `hf-ft blocks` prints."""
    total = sum(parameter.numel() for parameter in model.parameters())
    kind = getattr(getattr(model, "config", None), "model_type", "?")
    rows = [
        (part.name, f"{size:,}", f"{size / max(1, total):.1%}", ", ".join(part.modules))
        for part, size in ((part, _size(model, part)) for part in found.parts)
    ]
    stages = " | ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in found.stages)
    facts = [("stages", f"{len(found.stages)}, of the blocks {stages}"), *_norms(model)]
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    if frozen:
        facts.append(("frozen", f"{frozen:,} parameters that never train"))
    title = f"{type(model).__name__} ({kind}): {total:,} parameters, {len(found.blocks)} blocks"
    return "\n".join([title, "", table(rows, ("part", "parameters", "share", "modules")), "", table(facts)])


def _size(model: nn.Module, part: Part) -> int:
    names = dict(model.named_parameters())
    return sum(
        p.numel() for name, p in names.items() if any(name == m or name.startswith(f"{m}.") for m in part.modules)
    )


def _norms(model: nn.Module) -> list[tuple[str, str]]:
    kinds = Counter(type(norm).__name__ for _, norm in norm_layers(model))
    facts = [("norms", ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "none")]
    momenta = Counter(norm.momentum for _, norm in batch_norms(model))
    if momenta:
        shown = ", ".join(f"{momentum} on {number} layers" for momentum, number in momenta.items())
        facts.append(("momentum", shown))
    trapped = tensorflow_momentum(model)
    if trapped:
        facts.append(
            (
                "",
                f"On {len(trapped)} layers it is TensorFlow's decay: in training their running statistics would be "
                "about the last batch's. Strategies set it to 0.1 (--NAME.batch_norm_momentum keep leaves it).",
            )
        )
    return facts
