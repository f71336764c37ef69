"""``hf-ft demo``: a comparison of seven strategies on real images of solar cells."""

from __future__ import annotations

import shlex

from hf_ft.cli.compare import run_compare
from hf_ft.cli.console import say, table
from hf_ft.cli.request import with_defaults

FLAGS = {
    "model": "mobilenet_v2",
    "dataset": "elpv",
    "image_size": "96",
    "labelled": "750",
    "validation_fraction": "0.3333",
    "test_fraction": "0.7142",
    "strategies": "stock,linear_probe,full,lp_ft,l2_sp,daft,blockwise",
    "trials": "0",
    "seeds": "1",
    "num_train_epochs": "5",
    "output_dir": "runs/demo",
}
HELP = """hf-ft demo: which strategy finds defective solar cells best?

usage: hf-ft demo [flags of hf-ft compare]

Runs `hf-ft compare` on ELPV, 2,624 images of solar cells, with an ImageNet MobileNetV2. 500 images are for training,
250 for choosing the best epoch and the winner, and the other 1,874 for the test. The metric is balanced accuracy, the
mean of the accuracies on the two classes. Nothing is tuned: each strategy runs once with its defaults. `stock` is full
fine-tuning with the default arguments of Transformers' Trainer; the line after the table says what the winner gained
over it.

examples:
  hf-ft demo --seeds 3                          continues: two more runs of each, mean ± std
  hf-ft demo --trials 4 --output_dir runs/tuned
  hf-ft demo --model efficientnet-lite0 --strategies linear_probe,lp_ft,layer_decay --output_dir runs/lite0

flags set by the demo; yours take precedence, and `hf-ft compare --help` lists the others
{flags}

Written to --output_dir: report.html, report.md, results.json, best/ (the winner, a plain Transformers checkpoint), and
example.png, a test image to try it on."""


def run_demo(arguments: list[str]) -> None:
    """Run the comparison; flags given by the user replace those of the demo."""
    if {"-h", "--help"} & set(arguments):
        say(HELP.format(flags=table([(f"  --{name}", value) for name, value in FLAGS.items()])))
        return
    if any(word.partition("=")[0] == "--report" for word in arguments):  # trains nothing: no other flag has an effect
        return run_compare(arguments)
    words = with_defaults(arguments, FLAGS)
    say(
        f"hf-ft demo: which fine-tuning strategy finds defective solar cells best? The same as\n\n  {_command(words)}\n"
    )
    run_compare(words, example="example.png", over=FLAGS["strategies"].partition(",")[0])


def _command(words: list[str]) -> str:
    return shlex.join(["hf-ft", "compare", *words]).replace(" --", " \\\n      --")
