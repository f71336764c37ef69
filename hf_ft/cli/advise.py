"""``hf-ft advise``: cheap statistics of model and data, and the strategies to try first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_ft.advice import Advice, Reason, advise
from hf_ft.advice.evidence import shipped
from hf_ft.advice.rules import config_at_hand
from hf_ft.advice.signals import explained
from hf_ft.cli.checks import refuse
from hf_ft.cli.console import Parser, is_main, refusals, say, table, with_flags
from hf_ft.cli.flags import SOURCES_FLAGS, DataFlags, MethodFlags, StreamFlags
from hf_ft.cli.logs import quieten
from hf_ft.cli.prepare import check_data, check_rows, prints_for, read_data
from hf_ft.cli.request import Request, read
from hf_ft.cli.train import check_request
from hf_ft.core.compose import shared_option
from hf_ft.core.config import BASELINE
from hf_ft.data.classifier import load_classifier
from hf_ft.data.columns import Columns
from hf_ft.data.progress import hide_bars
from hf_ft.data.task import Data, process
from hf_ft.errors import OptionError
from hf_ft.models.source_head import has_source_head
from hf_ft.zoo.datasets import DATA_NOTICES

DEFAULT_FOLDER = "runs/advice"
FILE = "advice.json"
TAKEN = ("output_dir", "seed", "use_cpu", "disable_tqdm", "ddp_backend", "ddp_timeout")  # training arguments
TOLD = 3  # number of strategies for which the next command is printed
SHOWN = 5  # number of strategies that are printed without --all, besides the baseline
GAIN = (
    "gain: expected difference from full fine-tuning, in points of balanced accuracy. It says what to try first, not "
    "what will win (docs/advise.md)."
)
SAME_ORDER = (
    "In our comparisons the reasons without a number did not improve on the order of the mean gains, so they do not "
    "change it; they are listed for you to weigh."
)
HELP = """hf-ft advise: which strategies to try first, without training.

usage: hf-ft advise --model MODEL --dataset DATA [flags]

The training samples pass through the pretrained model once, and a few batches of them twice. The command measures the
cross-validated score of a linear probe on the features, LogME, the shift of the BatchNorm statistics since pretraining,
where in the network the gradient is large, and the number of samples. From these figures, and from what each strategy
gained in our own comparisons, it derives an order of all strategies, with reasons for each. The order says what to try
first, not what will win: compare the top ones on validation data.

example:
  hf-ft advise --model microsoft/resnet-18 --dataset my_photos/

Only the training split is used; if it has more than 5,000 samples, 5,000 of them are drawn. Written to --output_dir
(default: runs/advice): advice.json and data_checks.json.

flags of its own
{flags}

model and data
{data}

--seed sets the order of the samples and the folds; --use_cpu true avoids the GPU. docs/advise.md explains each
figure, and each rule with its source."""


def run_advise(arguments: list[str]) -> None:
    """Measure, then print and save the statistics and the order."""
    own = _own_flags()
    if not arguments or {"-h", "--help"} & set(arguments):
        say(_help(own))
        return
    flags, rest = own.parse_known_args(arguments)
    request = read(rest)
    request = replace(request, given={"output_dir": DEFAULT_FOLDER, **request.given})
    _check(request)
    quieten()
    folder = request.output_dir
    with refusals():
        args = TrainingArguments(**request.training_arguments())
    hide_bars(args.disable_tqdm or not is_main())
    others = [name.strip() for name in (flags.source_models or "").split(",") if name.strip()]
    found, data = _advise(request, args, members=1 + len(others))
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        if data.checks is not None:
            data.checks.save(folder)
        (folder / FILE).write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    if flags.json:
        say(json.dumps(found.to_dict(), indent=2))
    else:
        shown = None if flags.all else SHOWN
        say(_report(found, request, others, folder, check_rows(data, folder), shown))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _own_flags() -> Parser:
    parser = Parser(prog="hf-ft advise", add_help=False)
    parser.add_argument("--json", action="store_true", help="print advice.json instead of tables")
    parser.add_argument("--all", action="store_true", help=f"print all strategies instead of the first {SHOWN}")
    parser.add_argument(
        "--source_models",
        metavar="A,B",
        help=f"further pretrained models that can be fine-tuned together with --model ({', '.join(SOURCES_FLAGS)})",
    )
    return parser


def _help(own: Parser) -> str:
    shown = [(f"  --{a.dest}", a.help or "") for a in own._actions]
    shown.append(("  --output_dir", f"folder of {FILE} (default: {DEFAULT_FOLDER})"))
    data = [(f"  --{f.name}", _one_line(f)) for f in fields(DataFlags) if f.name != "augment"]
    return HELP.format(flags=table(shown), data=table(data))


def _one_line(flag: Any) -> str:
    text = " ".join(str(flag.metadata["help"]).split()).partition("; several: ")[0]
    return text if flag.default in (None, "") or "default: " in text else f"{text} (default: {flag.default})"


def _check(request: Request) -> None:
    """Reject flags that are invalid regardless of model and data.

    Raises:
        OptionError: as in ``hf-ft train``, except for a folder in use; or for a flag that does not apply here.
    """
    if request.method.strategy:
        raise OptionError("advise ranks all strategies; leave --strategy out.")
    arguments = {name: value for name, value in request.given.items() if name not in TAKEN}
    refuse(arguments, arguments, "advise trains nothing")
    refuse(
        request.flags,
        [flag.name for kind in (MethodFlags, StreamFlags) for flag in fields(kind)],
        "advise trains nothing",
    )
    check_request(replace(request, method=replace(request.method, overwrite=True)))
    file = request.output_dir / FILE
    if file.exists() and not _is_ours(file):
        raise OptionError(f"--output_dir {file} exists, and this command did not write it: name another folder.")
    if request.data.augment not in (None, "none"):
        raise OptionError(
            f"--augment {request.data.augment}: advise uses the samples without augmentation; leave it out."
        )


def _is_ours(file: Path) -> bool:
    """Whether a file holds advice, so that it may be replaced."""
    try:
        return {"order", "signals", "recommendations"} <= set(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return False


def _advise(request: Request, args: TrainingArguments, members: int) -> tuple[Advice, Data]:
    """Load model and data as in ``hf-ft train``, and measure them."""
    prints = prints_for(request.data)
    reading = args.main_process_first(desc="reading the data")
    data = read_data(replace(request.data, source_dataset=None), reading=reading, splits=["train"], prints=prints)
    columns = data.columns
    if columns.problem_type != "single_label_classification":
        raise OptionError(
            f"column {columns.label!r} is read as {columns.problem_type.replace('_', ' ')}: advise needs one class per "
            "sample. Set --label_column, or choose among the strategies with `hf-ft train`."
        )
    data = check_data(data, request.data, prints, request.output_dir)
    with refusals():
        model, processor = _load(request, columns, args.seed)
    with args.main_process_first(desc="preparing the data"):
        processed = process(data, model, processor)
    found = advise(
        model.to(args.device),
        processed.splits["train"],
        processed.collate,
        source_head=has_source_head(model),
        source_data=request.data.source_dataset is not None,
        members=members,
        seed=args.seed,
        head=shared_option(request.configs, "head"),
        blocks=shared_option(request.configs, "blocks"),
        groups=data.groups,
    )
    return found, data


def _load(request: Request, columns: Columns, seed: int) -> tuple[Any, Any]:
    """Model and processor, with the pretrained head if it can be kept."""
    head = shared_option(request.configs, "head")
    flags = request.data
    where = (str(flags.model), columns, seed, flags.image_size, flags.revision)
    try:
        return load_classifier(*where, keep_source_head=True, head=head)
    except OptionError:  # e.g. a head of several modules, which cannot be kept
        return load_classifier(*where, head=head)


def _report(
    found: Advice,
    request: Request,
    others: Sequence[str],
    folder: Path,
    checks: Sequence[tuple[str, str]],
    shown: int | None,
) -> str:
    """The statistics, the order and the next steps as text, after the findings of the data checks."""
    s = found.signals
    lines = [f"{request.data.model} on {request.data.dataset}, training samples only\n"]
    told = [("notice", DATA_NOTICES[name]) for name in [request.data.dataset] if name in DATA_NOTICES]
    if told or checks:
        lines.append(f"{table([*told, *checks])}\n")
    figures = [(name, figure, with_flags(meaning, ["class_weights"])) for name, figure, meaning in explained(s)]
    lines.append(table(figures, ("signal", "figure", "meaning")))
    lines.append(
        f"\n{s.forward_samples:,} samples forward, {s.backward_samples:,} forward and backward, {s.seconds:.0f} s.\n"
    )
    lines.append(table(order_rows(found, shown), ("", "strategy", "gain", "why")))
    if shown is not None:
        lines.append(f"\n{_left_out(found, shown)}")
    lines.append(f"\n{GAIN}{'' if shipped().worth else ' ' + SAME_ORDER} Next:\n")
    lines += [f"  {command}" for command in _next(found, request.data, others)]
    return "\n".join([*lines, f"\nIn {folder}: {FILE}."])


def _shows(place: int, strategy: str, shown: int | None) -> bool:
    """Whether a strategy is printed: the first ones, and the baseline that the gains refer to."""
    return shown is None or place <= shown or strategy == BASELINE


def _left_out(found: Advice, shown: int) -> str:
    """What the table leaves out, and what the strategies that cannot run would need."""
    rest = [one for place, one in enumerate(found.recommendations, 1) if not _shows(place, one.strategy, shown)]
    lines = [f"{len(rest)} more with --all, and in {FILE}."]
    lines += [f"{one.strategy} cannot run: {one.reasons[0].text}." for one in rest if not one.usable]
    return "\n".join(lines)


def order_rows(found: Advice, shown: int | None = None) -> list[tuple[str, str, str, str]]:
    """One row per reason, of the first ``shown`` strategies and the baseline, or of all.

    Only the first row of a strategy shows rank, name and gain.
    """
    rows = []
    for place, one in enumerate(found.recommendations, 1):
        if not _shows(place, one.strategy, shown):
            continue
        score = _points(one.score) if one.usable else "-"
        for index, reason in enumerate(one.reasons):
            first = (str(place), one.strategy, score) if index == 0 else ("", "", "")
            rows.append((*first, _reason(reason)))
    return rows


def _reason(reason: Reason) -> str:
    return f"{_points(reason.points)}  {reason.text}" if reason.points else reason.text


def _points(gain: float) -> str:
    return f"{100 * gain:+.1f}" if gain else "0"


def _next(found: Advice, flags: DataFlags, others: Sequence[str]) -> list[str]:
    """Commands that train the top strategies on the same data, and one that compares all strategies in this order."""
    same = [(f.name, getattr(flags, f.name)) for f in fields(DataFlags)]
    usual = {f.name: f.default for f in fields(DataFlags)}
    data = {name: str(value) for name, value in same if value not in (None, usual[name])}
    commands = []
    for name in found.usable[:TOLD]:
        words = ["hf-ft", "train", "--strategy", name]
        several = name in SOURCES_FLAGS
        words += [word for k, v in data.items() if not (several and k == "model") for word in (f"--{k}", v)]
        words += _source_free(name, flags)
        if several:
            words += [SOURCES_FLAGS[name], ",".join([str(flags.model), *others])]
        commands.append(shlex.join([*words, "--output_dir", f"runs/{name}"]))
    words = [word for k, v in data.items() for word in (f"--{k}", v)]
    return [*commands, shlex.join(["hf-ft", "compare", *words, "--advise", "True"])]


def _source_free(name: str, flags: DataFlags) -> list[str]:
    """The flags of a strategy's source-free form, if there are no source data."""
    usual, chosen = config_at_hand(name, True), config_at_hand(name, flags.source_dataset is not None)
    if usual is None or chosen is None:
        return []
    plain = usual.to_dict()
    return [word for k, v in chosen.to_dict().items() if v != plain[k] for word in (f"--{name}.{k}", str(v))]
