"""``hf-ft search-blocks``: find the block worth training; output as table, JSON and plot."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from hf_ft.cli.checks import refuse
from hf_ft.cli.console import is_main, say, table
from hf_ft.cli.cores import warn_if_crowded
from hf_ft.cli.findings import show_findings
from hf_ft.cli.prepare import check_rows, make
from hf_ft.cli.request import TRAIN, read, taken, with_defaults
from hf_ft.cli.workers import WorkerFlags, check_workers, other_workers, same_command
from hf_ft.comparison.worker import become_worker, visible_gpus
from hf_ft.core.config import config_class
from hf_ft.core.context import State
from hf_ft.core.options import options
from hf_ft.errors import OptionError

NO_EFFECT = ("metrics", "overwrite", "num_train_epochs", "max_steps", "resume_from_checkpoint")
DEFAULTS = {"output_dir": "runs/blocks", "augment": "none"}
HELP = """hf-ft search-blocks: find the block worth training (block-wise fine-tuning).

usage: hf-ft search-blocks --model MODEL --dataset DATA [--scheme SCHEME ...] [flags of hf-ft train]
       hf-ft search-blocks ... --workers N             (N processes share the candidates)

Each candidate block is trained together with the head for a few epochs, from the same start, on part of the training
samples; the rest are used to rank the candidates. Trials are stored in an Optuna study: the same command continues an
interrupted search, and several processes or machines with the same --storage share one.

example:
  hf-ft search-blocks --model microsoft/resnet-18 --dataset my_photos/ --scheme stage --search_seeds 3

Written to --output_dir (default: runs/blocks): blocks.json, blocks.md, blocks.png, data_checks.json and
the study.

flags of the search
{flags}

`hf-ft blocks MODEL --scheme SCHEME` lists the candidates, `hf-ft train --help` the other flags. Images are not
augmented by default (--augment basic does), so that frozen parts are computed once."""


def run_search_blocks(arguments: list[str]) -> None:
    """Run the search, then print and save the scores."""
    own = [field for field in options(config_class("blockwise")) if field.name != "block"]
    if not arguments or {"-h", "--help"} & set(arguments):
        rows = [(f"--{f.name}", f"{f.metadata['help']} (default: {f.default})") for f in (*own, *fields(WorkerFlags))]
        say(HELP.format(flags=table(rows, indent="  ")))
        return
    names = {field.name for field in own}
    request = read(
        ["--strategy", "blockwise", *(_prefixed(word, names) for word in with_defaults(arguments, DEFAULTS))],
        (*TRAIN, WorkerFlags),
    )
    for name in ("model", "dataset"):
        if not getattr(request.data, name):
            raise OptionError(f"--{name} is missing: a Hub id, a folder or file, or a short name.")
    if len(request.configs) > 1:
        raise OptionError("search-blocks searches for blocks only: leave --strategy out.")
    refuse(
        request.flags,
        NO_EFFECT,
        "each candidate trains for --search_epochs, and an interrupted search resumes by itself",
    )
    refuse(request.flags, ("mixup", "cutmix"), "candidates train on unmixed images")
    config: Any = request.configs[0]
    workers = WorkerFlags(**taken(request.flags, WorkerFlags)).workers
    gpus = [] if workers == 1 or request.given.get("use_cpu") else visible_gpus()
    check_workers(workers, len(gpus))
    if workers > 1:
        if config.storage == "memory":
            raise OptionError(f"--storage memory cannot be shared by --workers {workers}: leave one of them out.")
        become_worker()
    made = make(request)
    if made.data.checks is not None and is_main():
        say(table(check_rows(made.data, request.output_dir)))
        made.data.checks.save(request.output_dir)
    if made.trainer.args.device.type == "cpu":
        warn_if_crowded(torch.get_num_threads())
    with other_workers(workers, same_command("search-blocks", arguments), gpus):
        scores = config.search(made.trainer.model, made.trainer.context())
    show_findings(config.findings(State(info={"scores": scores.to_dict()})), request.output_dir)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _prefixed(word: str, names: set[str]) -> str:
    """Convert ``--scheme`` to ``--blockwise.scheme``, its name in ``hf-ft train``."""
    flag, equals, value = word.partition("=")
    name = flag[2:].replace("-", "_")
    return f"--blockwise.{name}{equals}{value}" if flag.startswith("--") and name in names else word
