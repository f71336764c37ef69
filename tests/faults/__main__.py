"""Crashes and damaged files at scale: `python -m tests.faults`, or `make faults`.

Four parts: `kills` ends training runs, searches and comparisons with SIGKILL at random moments and lets them continue;
`workers` ends some of the processes that share a comparison or a search, and perhaps the one that started the others;
`operations` ends a comparison and a training run that saves checkpoints before and within each of their file
operations; `mutations` gives the commands wrong flags and damaged files. After a kill, what a run finally leaves must
be that of an undisturbed run, bit for bit except for times; a command with a wrong input must end within a minute with
status 0 or 2, without a traceback.

Results are kept, one per line; cases that are already there are not tried again, so a run can be stopped and continued.
What a failed case leaves is kept next to them. `--page` writes the table into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from hf_ft.cli.console import table as aligned
from tests.faults import results as kept_results
from tests.faults.processes import preload
from tests.faults.results import HEADS, PARTS, RIGHT, Case, Kept, Outcome, Result

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->", "<!-- faults end -->"


def cases(options: argparse.Namespace, scratch: Path) -> Iterator[Case]:
    """The requested cases."""
    from tests.faults import kills, mutations, operations, workers
    from tests.faults.materials import Materials
    from tests.faults.workloads import Wholes

    for name in ("materials", "wholes"):
        (scratch / name).mkdir()
    materials, wholes = Materials(scratch / "materials"), Wholes(scratch / "wholes")
    if "kills" in options.only:
        yield from kills.cases(options.cases or kills.NUMBER, options.seed, materials, wholes)
    if "workers" in options.only:
        yield from workers.cases(options.cases or workers.NUMBER, options.seed, materials, wholes)
    if "operations" in options.only:
        found = list(operations.cases(materials, wholes, scratch))
        yield from found[: options.cases]
    if "mutations" in options.only:
        yield from mutations.cases(options.cases or mutations.NUMBER, options.seed, materials)


def tried(case: Case, seed: int, failures: Path) -> Result:
    """Try one case in a new folder, which is kept if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "case")
        folder.mkdir()
        began = time.monotonic()
        try:
            outcome = case.run(folder)
        except OSError as error:
            outcome = Outcome(kept_results.WRONG, f"the case itself failed: {error!r}")
        seconds = round(time.monotonic() - began, 2)
        if outcome.verdict != RIGHT:
            left = failures / case.name.replace("/", "-").replace(" ", "_")
            shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(scratch, left, symlinks=True)
    return Result(case.name, seed, outcome.verdict, outcome.detail, outcome.kills, seconds)


def go(options: argparse.Namespace) -> None:
    """Try the missing cases."""
    kept = Kept(options.folder / "results.jsonl")
    preload()
    with tempfile.TemporaryDirectory() as scratch:
        chosen = [case for case in cases(options, Path(scratch)) if not options.case or case.name in options.case]
        left = [case for case in chosen if options.case or (case.name, options.seed) not in kept.results]
        bar = tqdm(left, initial=len(chosen) - len(left), total=len(chosen), unit="case", smoothing=0.05)
        for case in bar:
            bar.set_description(f"{case.part}, {case.kind}")
            result = tried(case, options.seed, options.folder / "failed")
            kept.add(result)
            if result.verdict != RIGHT:
                bar.write(f"{result.name}: {result.verdict}: {result.detail}")


def summary(results: list[Result]) -> str:
    """The table, and each failure with the command that reproduces it."""
    failures = [result for result in results if result.verdict != RIGHT]
    lines = [aligned(kept_results.table(results), HEADS), ""]
    lines += [f"--case '{result.name}' --seed {result.seed}: {result.verdict}: {result.detail}" for result in failures]
    return "\n".join(lines)


def write_page(results: list[Result]) -> None:
    """Write the table between the markers in docs/reliability.md."""
    rows = [HEADS, ("---",) * len(HEADS), *kept_results.table(results)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Parse the flags; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: all parts")
    parser.add_argument(
        "--cases",
        type=int,
        help="cases of each part (default: 100 kills, 20 of workers, all operations, 1000 mutations)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs="+", help="try these cases alone, also if they are kept")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="where results are kept")
    parser.add_argument("--page", action="store_true", help="only write the table of docs/reliability.md")
    options = parser.parse_args()
    if options.page:
        write_page(Kept(options.folder / "results.jsonl").of_seed(options.seed))
        return
    try:
        go(options)
    finally:
        print(summary(Kept(options.folder / "results.jsonl").of_seed(options.seed)))


if __name__ == "__main__":
    main()
