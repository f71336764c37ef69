"""What the swarm found, as a table, as JSON and as plots."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from hf_ft.cli.console import is_main, say, table
from hf_ft.strategies.amcf.scores import SwarmScores
from hf_ft.strategies.blockwise.scores import BlockScores

SHOWN = 12  # best positions in the printed table; swarm.json has all


def report_swarm(scores: SwarmScores, folder: Path) -> None:
    """Print the best positions, and write ``swarm.json`` and, with matplotlib, ``swarm.png``, ``swarm_scores.png``."""
    headers, rows = scores.table()
    say(f"\nlayers that stay frozen, {scores.metric} on held-out training samples:\n")
    say(table(rows[:SHOWN], headers))
    say(f"\n{scores.verdict()}")
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "swarm.json").write_text(json.dumps(scores.to_dict(), indent=2) + "\n", encoding="utf-8")
    written = ["swarm.json"]
    if importlib.util.find_spec("matplotlib") is not None:
        from hf_ft.strategies.amcf.plot import plot_scores, plot_swarm

        plot_swarm(scores, folder / "swarm.png")
        written.append("swarm.png")
        if len(scores.layers) < 3:
            plot_scores(scores, folder / "swarm_scores.png")
            written.append("swarm_scores.png")
    say(f"\nIn {folder}: {', '.join(written)}.")


def report(scores: BlockScores, folder: Path) -> None:
    """Print the scores, and write ``blocks.json``, ``blocks.md`` and, with matplotlib, ``blocks.png``."""
    from hf_ft.cli.console import is_main

    headers, rows = scores.table()
    say(f"\nblocks by {scores.scheme}, {scores.metric} on held-out training samples:\n")
    say(table(rows, headers))
    say()
    say(table(scores.verdict()))
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "blocks.json").write_text(json.dumps(scores.to_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "blocks.md").write_text(scores.markdown() + "\n", encoding="utf-8")
    written = ["blocks.json", "blocks.md"]
    if importlib.util.find_spec("matplotlib") is not None:
        from hf_ft.strategies.blockwise.plot import plot_scores

        plot_scores(scores, folder / "blocks.png")
        written.append("blocks.png")
    say(f"\nIn {folder}: {', '.join(written)}.")
