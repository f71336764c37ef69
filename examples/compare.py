"""Compare a few strategies on a folder with one subfolder per class, print the ranking, and save the winner.

    python examples/compare.py --model microsoft/resnet-18 --data photos/ --strategies linear_probe lp_ft lp_ft+l2_sp
    accelerate launch --multi_gpu --num_processes 2 examples/compare.py --model ... --data ...

Under a launcher, each process is a worker that takes the next training run. An interrupted comparison continues when it
is started again. On a machine without a GPU, add `--use_cpu True`; every field of `hf_ft.comparison.Settings` is a
flag.
"""

import os
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hf_ft.cli.console import is_main, say
from hf_ft.comparison import Settings
from hf_ft.comparison.prepare import prepare_comparison
from hf_ft.comparison.statistics import standings
from hf_ft.comparison.worker import become_worker
from hf_ft.data import load_splits


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or folder of an image classifier or backbone."})
    data: str = field(metadata={"help": "Folder of class folders."})
    strategies: list[str] = field(
        default_factory=lambda: ["linear_probe", "lp_ft", "l2_sp"],
        metadata={"help": "Names from `hf-ft list`; a+b composes two. Full fine-tuning always takes part."},
    )
    output_dir: str = field(
        default="runs/comparison", metadata={"help": "Folder for the report, the results and the winner."}
    )
    num_train_epochs: int = field(default=16, metadata={"help": "Epochs per training run."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is a GPU."})


def main() -> None:
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    become_worker()  # before anything looks for a GPU
    script, settings = HfArgumentParser((Arguments, Settings)).parse_args_into_dataclasses()

    splits = load_splits(script.data, test_fraction=0.25)  # also holds out a validation split, if there is none
    prepared = prepare_comparison(
        script.model,
        splits,
        script.strategies,
        output_dir=script.output_dir,
        settings=settings,
        tell=say,  # on the first process
        num_train_epochs=script.num_train_epochs,
        use_cpu=script.use_cpu,
    )
    say(prepared.estimate())
    prepared.runner.run()  # returns in all processes once the last training run is done
    if not is_main():
        return
    results = prepared.finish("python examples/compare.py")

    print(f"\n{results.metric}, mean over {settings.seeds} seeds; the best on validation first:")
    for standing in standings(results):
        if standing.rank is None:
            print(f"   {standing.name}: {standing.contender.status}, {standing.contender.reason}")
            continue
        scores = ", ".join(f"{split} {spread.mean:.3f}" for split, spread in standing.spreads.items())
        difference = standing.differences.get("test")
        versus = "" if difference is None else f", {difference.mean:+.3f} vs. full on test"
        print(f"{standing.rank:>2} {standing.name}: {scores}{versus}")
    print(f"{workers} worker(s), winner: {results.winner or 'none'}; see {script.output_dir}/report.html")


if __name__ == "__main__":
    main()
