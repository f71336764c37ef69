"""``hf-ft evaluate``: score a trained model on labelled data, with a page of its confusions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hf_ft.cli.checks import refuse
from hf_ft.cli.console import is_main, say, table
from hf_ft.cli.help import inference_help
from hf_ft.cli.inference_flags import WORDS, EvaluateFlags
from hf_ft.cli.logs import quieten
from hf_ft.cli.predict import check_output, prepared, tell_unreadable, write_lines, written_whole
from hf_ft.cli.request import read_own
from hf_ft.errors import OptionError
from hf_ft.inference.checkpoint import Trained
from hf_ft.inference.evaluation import FILES, calibrate, data_name, evaluation, is_ours
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
    _check_calibration(flags)
    check_output(folder / PREDICTIONS, flags.overwrite, "output_dir")
    for name in FILES:
        check_output(folder / name, flags.overwrite, "output_dir", is_ours)
    if not is_main():  # of several processes, one predicts
        return
    quieten()
    trained, inputs = prepared(flags, labelled=True)
    trained = _calibrated(trained, flags)
    threshold, options = flags.probability_threshold(), flags.options()
    scorer = Scorer(trained.wanted, threshold)
    layout = Layout(trained.wanted, threshold=threshold, labelled=True)
    with written_whole(folder / PREDICTIONS) as out:
        write_lines(layout.lines(scorer.watch(predictions(trained, inputs, options))), out)
    tell_unreadable(scorer)
    found = evaluation(
        trained, scorer, data_name(flags.dataset) + (f" ({flags.split})" if flags.split else ""), options
    )
    written = found.save(folder)
    say(table([("model", flags.model), ("data", f"{found.data}: {found.rows:,} samples")]))
    say()
    say(table([(metric, f"{value:.4f}") for metric, value in found.scores.items()]))
    say(f"\nIn {folder}: {', '.join([*(file.name for file in written), PREDICTIONS])}.")


def _check_calibration(flags: EvaluateFlags) -> None:
    if flags.calibrate is None:
        refuse({"calibrate_split": flags.calibrate_split}, ["calibrate_split"], "--calibrate is not set")
    elif flags.uncalibrated:
        raise OptionError("--calibrate fits a temperature, but --uncalibrated does not apply it: give only one.")
    elif not Path(str(flags.model)).expanduser().is_dir():
        raise OptionError(f"--calibrate writes into the checkpoint, but --model {flags.model} is not a local folder.")


def _calibrated(trained: Trained, flags: EvaluateFlags) -> Trained:
    """The model with a new temperature, which is saved next to its weights."""
    if flags.calibrate is None:
        return trained
    reading = replace(flags.reading(), split=flags.calibrate_split)
    trained = calibrate(trained, flags.calibrate, reading, flags.options())
    found = trained.calibration
    assert found is not None
    file = found.save(Path(str(flags.model)).expanduser())
    changes = (
        f"log loss {found.log_loss[0]:.4f} to {found.log_loss[1]:.4f}, ece {found.ece[0]:.4f} to {found.ece[1]:.4f}"
    )
    say(f"temperature {found.temperature:.4g} in {file}; on {found.rows:,} samples of {found.data}: {changes}\n")
    return trained
