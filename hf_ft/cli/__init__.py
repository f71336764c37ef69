"""The command ``hf-ft``. Each subcommand is a module whose run function is imported on demand."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hf_ft.cli.console import is_main, one_line, rank, say
from hf_ft.cli.cores import take_share
from hf_ft.cli.workers import end_with_parent, interrupt_once
from hf_ft.errors import Error, OptionError, unknown
from hf_ft.search.environment import environment_error
from hf_ft.version import __version__

COMMANDS = {
    "train": ("train", "fine-tune an image, text or audio classifier with a strategy"),
    "list": ("catalog", "all strategies in a table"),
    "describe": ("catalog", "one strategy: paper, formula, options and their defaults"),
    "blocks": ("blocks", "the parts of a model: stem, blocks, neck, head, normalisation layers"),
    "search-blocks": ("search_blocks", "find the block worth training, and plot scores over depth"),
    "advise": ("advise", "which strategies to try first on your data, from cheap statistics, with reasons"),
    "compare": ("compare", "which strategy is best on your data: equal tuning budgets, one report"),
    "predict": ("predict", "classify files or rows with a trained model: csv or jsonl"),
    "evaluate": ("evaluate", "score a trained model on labelled data: metrics, confusions, an HTML page"),
    "export": (
        "export",
        "convert a trained model to ONNX or torch.export, to run without Transformers, and check it",
    ),
    "push": ("push", "upload a saved model, adapter, ensemble or delta to the Hub"),
    "demo": ("demo", "compare seven strategies on real images, in a few minutes and without a GPU"),
}
SHARED = ("compare", "search-blocks", "demo")  # commands whose work several processes share
HELP = """hf-ft: fine-tuning strategies for Hugging Face models.

usage: hf-ft COMMAND [flags]
       accelerate launch -m hf_ft COMMAND [flags]

{commands}

`hf-ft COMMAND --help` shows the flags of a command. Start with `hf-ft demo`.
--version prints the version. --traceback (or HF_FT_TRACEBACK=1) shows where an error was raised.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for errors that the user can fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback_wanted = "--traceback" in arguments or os.environ.get("HF_FT_TRACEBACK", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<14}{what}" for name, (_, what) in COMMANDS.items())
        say(HELP.format(commands=commands))
        return 0
    if arguments[0] == "--version":
        say(f"hf-ft {__version__}")
        return 0
    try:
        end_with_parent()
        take_share(arguments)
        _call(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return 130
    # All errors of hf_ft that the user can fix have these types; anything else is a bug and keeps its traceback.
    except (Error, ImportError, OSError) as error:
        if traceback_wanted:
            traceback.print_exc()
        print(_message(arguments[0], error), file=sys.stderr)
        return 2
    except Exception as error:
        # Libraries report a full disk or lack of memory with errors of many types.
        cause = environment_error(error)
        if cause is None or traceback_wanted:
            raise
        print(_message(arguments[0], cause), file=sys.stderr)
        return 2
    return 0


def _call(command: str, arguments: list[str]) -> None:
    if command not in COMMANDS:
        raise OptionError(unknown("command", command, COMMANDS))
    module = importlib.import_module(f"hf_ft.cli.{COMMANDS[command][0]}")
    run = getattr(module, f"run_{command.replace('-', '_')}")
    if command not in SHARED:
        run(arguments)
        return
    with _interrupted_by_sigterm():
        run(arguments)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, with which cluster schedulers announce the end of a job, interrupt like Ctrl-C, but only once.

    A worker then hands back its training run, which is not counted as one that killed its worker. A scheduler may send
    the signal both to a process and to its parent, which passes it on: the second signal must not interrupt the
    cleanup. A handler that is already installed, such as that of a process that ends with another, is kept.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    interrupt_once(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _message(command: str, error: BaseException) -> str:
    # Every process reports its errors; otherwise an error on a single process would be lost.
    where = "" if is_main() else f" [process {rank()}]"
    return f"hf-ft {command}{where}: error: {one_line(error)}"
