"""``hf-ft blocks``: the structure of a model as the strategies see it."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from torch import nn

from hf_ft.cli.console import Parser, say, table
from hf_ft.cli.models import skeleton
from hf_ft.core.config import config_class
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.norms import batch_norms, norm_layers, tensorflow_momentum
from hf_ft.models.parts import Anatomy, Part
from hf_ft.zoo.models import SHORT_NAMES

EPILOG = """--scheme shows what block-wise fine-tuning may adapt in addition to the head, nearest the output first:
  layer     each layer alone: a convolution, linear layer or embedding with the norm that follows it
  segment   the layers between two poolings or activations
  window    every run of --length consecutive layers
  stage     the architecture's own stages, in a plain transformer each block; and the stem
  block     each block by itself; the stem, and the neck where it holds layers
top_layers, the best layers together, needs the scores of a search by layer. The quarter is where a
candidate's centre lies in the depth: the best block is usually in the fourth (Barakat and Huang, ICMLA 2023).

example:
  hf-ft blocks microsoft/resnet-18
  hf-ft blocks microsoft/resnet-18 --scheme window --length 3
  hf-ft blocks my_model/ --head classifier --blocks 'encoder\\.layer\\.\\d+'"""


def run_blocks(arguments: list[str]) -> None:
    """Print the parts, stages and normalisation layers of a model, or its candidates for adaptation."""
    flags = _parser().parse_args(arguments)
    if flags.length is not None and flags.scheme != "window":
        raise OptionError("--length is the number of layers of a window: add --scheme window.")
    schemes = _blockwise().schemes
    if flags.scheme is not None and flags.scheme not in schemes:  # check before loading weights
        raise OptionError(f"--scheme {flags.scheme} is unknown. Choose one of {', '.join(schemes)}.")
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
    parser.add_argument("--head", help="module names of the head, separated by commas (default: found automatically)")
    parser.add_argument(
        "--blocks",
        help="regular expression that matches the full names of the blocks (default: known from the architecture)",
    )
    shown = ", ".join(name for name in _blockwise().schemes if name != "top_layers")
    parser.add_argument("--scheme", help=f"show the candidates for adaptation instead: {shown}")
    parser.add_argument("--length", type=int, help="number of layers in a window (default: 3)")
    return parser


def candidate_report(model: nn.Module, flags: argparse.Namespace) -> str:
    """The output of `hf-ft blocks --scheme`."""
    length = 3 if flags.length is None else flags.length
    found, facts = _blockwise().describe(model, flags.scheme, length=length, head=flags.head, blocks=flags.blocks)
    return "\n".join([found.caption, "", table(found.rows, found.headers), "", table(facts.rows)])


def _blockwise() -> Any:
    """The block-wise strategy, which defines the candidates."""
    return config_class("blockwise")


def report(model: nn.Module, found: Anatomy) -> str:
    """The output of `hf-ft blocks`."""
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
                f"On {len(trapped)} layers this is TensorFlow's decay: in training, their running statistics would be "
                "roughly those of the last batch. Strategies set it to 0.1 (--NAME.batch_norm_momentum keep leaves it "
                "unchanged).",
            )
        )
    return facts
