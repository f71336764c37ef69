"""A picture of the beginning of a report, for the docs.

python tests/benchmarks/screenshot.py runs/compare/results.json docs/report.png
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from hf_ft.comparison.report import write_report
from hf_ft.comparison.results import Results

FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"
COLOURS = 96  # of the picture: enough for text and marks, and a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(description="A picture of the beginning of a report.")
    parser.add_argument("results", type=Path, help="results.json of a comparison")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--width", type=int, default=1000, help="of the page, in pixels")
    parser.add_argument("--height", type=int, default=2485, help="of the picture, in pixels")
    flags = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        write_report(Results.load(flags.results), Path(folder) / "report")
        shot = Path(folder) / "shot.png"
        size = f"--window-size={flags.width},{flags.height}"
        page = (Path(folder) / "report" / "report.html").as_uri()
        profile = f"--user-data-dir={folder}/profile"
        command = [chromium, *FLAGS.split(), profile, size, f"--screenshot={shot}", page]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=120)
        Image.open(shot).convert("RGB").quantize(COLOURS).save(flags.picture, optimize=True)
    print(f"{flags.picture}: {flags.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
