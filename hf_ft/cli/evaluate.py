"""``hf-ft evaluate``: score a trained model on labelled data, with a page of its confusions."""

from __future__ import annotations

from pathlib import Path

from hf_ft.cli.console import is_main, say, table
from hf_ft.cli.help import inference_help
from hf_ft.cli.inference_flags import WORDS, EvaluateFlags
from hf_ft.cli.logs import quieten
from hf_ft.cli.predict import check_output, prepared, tell_unreadable, write_lines, written_whole
from hf_ft.cli.request import read_own
from hf_ft.documents.public import shareable_name
from hf_ft.errors import OptionError
from hf_ft.inference.evaluation import evaluation
from hf_ft.inference.predictor import predictions
from hf_ft.inference.scores import Scorer
from hf_ft.inference.table import Layout

PREDICTIONS = "predictions.csv"


def run_evaluate(arguments: list[str]) -> None:
    """Score the model, print the scores, and write the page."""
    if not arguments or {"-h", "--help"} & set(arguments):
        say(inference_help("evaluate", EvaluateFlags, WORDS["evaluate"]))
        return
    flags: EvaluateFlags = read_own(arguments, EvaluateFlags, "evaluate")
    flags.check()
    folder = Path(flags.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output_dir {folder} is a file: name a folder.")
    check_output(folder / PREDICTIONS, flags.overwrite, "output_dir")
    if not is_main():  # of several processes, one predicts
        return
    quieten()
    trained, inputs = prepared(flags, labelled=True)
    threshold, options = flags.threshold or 0.5, flags.options()
    scorer = Scorer(trained.wanted, threshold)
    layout = Layout(trained.wanted, threshold=threshold)
    with written_whole(folder / PREDICTIONS) as out:
        write_lines(layout.lines(scorer.watch(predictions(trained, inputs, options))), out)
    tell_unreadable(scorer)
    name = ", ".join(shareable_name(source) for source in flags.dataset)
    found = evaluation(trained, scorer, name + (f" ({flags.split})" if flags.split else ""), options)
    written = found.save(folder)
    say(table([("model", flags.model), ("data", f"{found.data}: {found.rows:,} samples")]))
    say()
    say(table([(metric, f"{value:.4f}") for metric, value in found.scores.items()]))
    say(f"\nIn {folder}: {', '.join([*(file.name for file in written), PREDICTIONS])}.")
