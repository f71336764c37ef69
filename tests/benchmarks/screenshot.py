"""A screenshot of the beginning of a report, for the docs.

python tests/benchmarks/screenshot.py runs/compare/results.json docs/report.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

from hf_ft.comparison.report import write_report
from hf_ft.comparison.results import Results

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.browser import chromium, find_chromium

COLOURS = 96  # of the picture: enough for text and marks, and a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(description="A picture of the beginning of a report.")
    parser.add_argument("results", type=Path, help="results.json of a comparison")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--width", type=int, default=1000, help="of the page, in pixels")
    parser.add_argument("--height", type=int, default=2485, help="of the picture, in pixels")
    flags = parser.parse_args()
    if find_chromium() is None:
        parser.error("there is no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        write_report(Results.load(flags.results), Path(folder) / "report")
        shot = Path(folder) / "shot.png"
        with chromium() as browser:
            page = browser.new_page(viewport={"width": flags.width, "height": flags.height})
            page.goto((Path(folder) / "report" / "report.html").as_uri())
            page.screenshot(path=shot)
        Image.open(shot).convert("RGB").quantize(COLOURS).save(flags.picture, optimize=True)
    print(f"{flags.picture}: {flags.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
