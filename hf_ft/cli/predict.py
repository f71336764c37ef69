"""``hf-ft predict``: classify files, folders, tables or data sets with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hf_ft.cli.console import is_main, refusals, say
from hf_ft.cli.help import inference_help
from hf_ft.cli.inference_flags import WORDS, ModelAndData, PredictFlags
from hf_ft.cli.logs import quieten
from hf_ft.cli.request import read_own
from hf_ft.data.inputs import Inputs, read_inputs
from hf_ft.errors import DataError, OptionError
from hf_ft.inference.checkpoint import Trained, load_trained
from hf_ft.inference.predictor import predictions
from hf_ft.inference.scores import Scorer
from hf_ft.inference.table import Layout, is_ours
from hf_ft.metrics import Scores

SHOWN = 5  # unreadable samples named in the message
FORMATS = {".csv": "csv", ".jsonl": "jsonl"}


def run_predict(arguments: list[str]) -> None:
    """Write a row for each sample; scores and what could not be read go to stderr."""
    if not arguments or {"-h", "--help"} & set(arguments):
        say(inference_help("predict", PredictFlags, WORDS["predict"]))
        return
    flags: PredictFlags = read_own(arguments, PredictFlags, "predict")
    flags.check()
    file = None if flags.output is None else Path(flags.output).expanduser()
    kind = _format(flags, file)
    if file is not None:
        check_output(file, flags.overwrite, "output")
    if not is_main():  # of several processes, one predicts
        return
    quieten()
    trained, inputs = prepared(flags)
    if inputs.why_not:
        say(f"note: no scores: {inputs.why_not}", error=True)
    threshold = flags.probability_threshold()
    scorer = Scorer(trained.wanted, threshold)
    layout = Layout(trained.wanted, kind, flags.top_k, threshold, inputs.labels is not None)
    found = scorer.watch(predictions(trained, inputs, flags.options()))
    with _opened(file) as out:
        write_lines(layout.lines(found), out)
    tell_unreadable(scorer)
    if scores := scorer.scores():
        say(f"{scorer.scored:,} rows with a label: {shown(scores)}", error=True)
    if file is not None:
        say(f"{scorer.rows:,} rows in {file}.", error=True)


def prepared(flags: ModelAndData, labelled: bool = False) -> tuple[Trained, Inputs]:
    """Model and data of a command.

    Raises:
        OptionError: if the model cannot be used, or a flag does not fit the data.
        DataError: if the data cannot be read, or do not fit the model.
    """
    with refusals():
        trained = load_trained(str(flags.model), revision=flags.revision, base=flags.base)
    _check_fitting(flags, trained)
    return trained, read_inputs(flags.dataset, trained.wanted, flags.reading(), labelled)


def _check_fitting(flags: ModelAndData, trained: Trained) -> None:
    """Refuse flags that have no effect on the data of this model."""
    task, kind = trained.wanted.task, trained.wanted.problem_type
    only: dict[str, Any] = {"max_length": "text", "max_seconds": "audio", "tta": "image"}
    for name, where in only.items():
        if getattr(flags, name) not in (None, False) and task != where:
            what = "--tta" if name == "tta" else f"--{name} {getattr(flags, name)}"
            raise OptionError(f"{what} has no effect: the model classifies {task} data. Leave it out.")
    if flags.threshold is not None and kind != "multi_label_classification":
        raise OptionError(
            f"--threshold {flags.threshold} has no effect: the model does not give several labels. Leave it out."
        )
    if flags.max_seconds is not None and not flags.max_seconds > 0:
        raise OptionError(
            f"--max_seconds {flags.max_seconds:g} is not a length in seconds: set it above 0, such as 20."
        )


def check_output(file: Path, overwrite: bool, flag: str, ours: Callable[[Path], bool] = is_ours) -> None:
    """Refuse to replace a file that this command did not write, by what ``ours`` says.

    Raises:
        OptionError: naming the fix.
    """
    if file.is_dir():
        raise OptionError(f"--{flag} {file} is a folder: name a file.")
    if file.exists() and not (overwrite or ours(file)):
        other = "folder" if flag == "output_dir" else "file"
        raise OptionError(
            f"--{flag} {file} exists, and this command did not write it: give another {other}, or add --overwrite."
        )


def _format(flags: PredictFlags, file: Path | None) -> Any:
    by_name = None if file is None else FORMATS.get(file.suffix.lower())
    if file is not None and by_name is None and flags.format is None:
        raise OptionError(f"--output {file} ends in neither {' nor '.join(FORMATS)}: rename it, or add --format.")
    return flags.format or by_name or "csv"


@contextmanager
def _opened(file: Path | None) -> Iterator[TextIO]:
    if file is None:
        yield sys.stdout
        return
    with written_whole(file) as out:
        yield out


@contextmanager
def written_whole(file: Path) -> Iterator[TextIO]:
    """A file under another name, which ends in ``.part``, until it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8", newline="") as out:
        yield out
    part.replace(file)


def write_lines(lines: Iterable[str], out: TextIO) -> None:
    """Write lines as they are produced."""
    for line in lines:
        out.write(line)
    out.flush()


def tell_unreadable(scorer: Scorer) -> None:
    """Report how many samples could not be read, and the first of them.

    Raises:
        DataError: if none could be read.
    """
    if not scorer.unreadable:
        return
    first = "; ".join(why if name in why else f"{name}: {why}" for name, why in scorer.unreadable[:SHOWN])
    more = f"; and {len(scorer.unreadable) - SHOWN} more" if len(scorer.unreadable) > SHOWN else ""
    told = f"{len(scorer.unreadable):,} of {scorer.rows:,} samples cannot be read: {first}{more}"
    if len(scorer.unreadable) == scorer.rows:
        raise DataError(f"{told}. Repair them, or use other data.")
    say(f"note: {told}", error=True)


def shown(scores: Scores) -> str:
    """Scores in one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
