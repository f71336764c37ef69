"""README and docs: all code runs and prints what is shown, links resolve, generated parts are up to date.

The blocks of a page run in order, in one namespace and one empty folder. ``<!-- setup: ... -->`` is Python that readers
do not see: it creates the files that a page mentions, with the functions of ``SETUP``, or asserts what the text says. A
``text`` block after code shows some lines of its output. A ``yaml`` block is a file, named in its first line. A
launcher's command runs in one process here.
"""

import contextlib
import io
import logging
import pkgutil
import re
import runpy
import shlex
import sys
import types
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ConvNextImageProcessorPil, PreTrainedTokenizerFast, TrainingArguments

import hf_ft
from docs.tools import tables as docs_tables
from hf_ft import advice, comparison, diagnostics, functional
from hf_ft.cli import main
from hf_ft.comparison import folds
from hf_ft.core import config as registry
from hf_ft.testing import tiny_data, tiny_resnet
from hf_ft.testing.models import tiny_distilbert
from tests.hub_server import Hub

ROOT = docs_tables.ROOT
PAGES = [page.relative_to(ROOT).as_posix() for page in docs_tables.pages()]
BLOCK = re.compile(r"^<!-- setup:(?P<hidden>.*?)-->$|^```(?P<kind>\w*)\n(?P<shown>.*?)^```$", re.M | re.S)
# Tested elsewhere or not at all: they install packages, or run for minutes.
EXEMPT = ("make demo", "make test", "pip install", "git clone", "hf-ft demo")
LAUNCHER = "accelerate launch --multi_gpu --num_processes 2 "
FOREIGN = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|usr)/|\b(?:TODO|FIXME)\b", re.I)


# What pages mention


def image_checkpoint(folder, make=tiny_resnet, classes=20):
    """A small random model with its own classes, where the page names one from the Hub."""
    make(num_labels=classes).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)


def photos(folder, classes=("cat", "dog"), each=10):
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        Path(folder, name).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(100 * number, 100 * number + 100, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder, name, f"{index}.png"))


def text_checkpoint(folder):
    words = ["[PAD]", "[UNK]", "a", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_distilbert(num_labels=2).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)


def reviews(file, rows=20):
    lines = [f"a {('good', 'bad')[i % 2]} film,{('positive', 'negative')[i % 2]}" for i in range(rows)]
    Path(file).write_text("\n".join(["text,label", *lines]) + "\n")


def tiny_run(**arguments):
    """Model, training arguments, and two datasets."""
    model = tiny_resnet()
    args = TrainingArguments("runs/tiny", max_steps=6, **{"learning_rate": 1e-3, **arguments})
    return model, args, tiny_data(model), tiny_data(model, 16, seed=1)


def hub(opened, home, **models):
    """A Hub with models from folders, which this process uses until the page has run."""
    server = opened.enter_context(Hub())
    opened.enter_context(server.used_here(home))
    for name, folder in models.items():
        server.add(name, folder)


SETUP = {f.__name__: f for f in (image_checkpoint, photos, text_checkpoint, reviews, tiny_run)}


# Running a page


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder; registry and logging are restored when the page has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(folds, "FEW", 0)  # as with more photos: comparisons do not repeat training on five folds
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    monkeypatch.setattr(sys, "argv", sys.argv)
    # A module, because dataclasses look up the names of their annotations in one.
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    logger = logging.getLogger("hf_ft")
    handlers, propagate = list(logger.handlers), logger.propagate
    with contextlib.ExitStack() as opened:
        monkeypatch.setitem(SETUP, "hub", partial(hub, opened, tmp_path / "home"))
        yield tmp_path
    logger.handlers[:], logger.propagate = handlers, propagate


def run_setup(code, names):
    names.update(SETUP)
    exec(code, names)
    for name in SETUP:
        names.pop(name, None)


def run_commands(text):
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith(EXEMPT):
            run_command(line.removeprefix(LAUNCHER), line)


def run_command(command, line):
    words = shlex.split(command, comments=True)
    words = words[1:] if words[0] == "python" else words
    if words[0] == "hf-ft" or words[:2] == ["-m", "hf_ft"]:
        assert main(words[1:] if words[0] == "hf-ft" else words[2:]) == 0, line
    else:
        assert words[0].endswith(".py"), f"{line!r} is neither run nor exempt"
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def assert_printed(expected, printed):
    """Check that every expected line was printed, in this order."""
    lines = iter(line.strip() for line in printed.splitlines())
    for line in expected.splitlines():
        assert line.strip() in lines, f"not printed: {line!r}\n--- printed:\n{printed}"


@pytest.mark.slow
@pytest.mark.usefixtures("shipped_strategies")
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, folder):
    text, names = (ROOT / page).read_text(), vars(sys.modules["page"])
    printed = None
    end = 0
    for block in BLOCK.finditer(text):
        follows = not text[end : block.start()].strip()
        kind, shown, end = block["kind"], block["shown"], block.end()
        if block["hidden"] is not None:
            run_setup(block["hidden"], names)
        elif kind == "yaml":
            Path(shown.splitlines()[0].removeprefix("# ")).write_text(shown)
        elif kind == "text":
            if follows and printed is not None:
                assert_printed(shown, printed)
        else:
            assert kind in ("python", "bash"), f"{page}: a block of kind {kind!r} is not run"
            line = text.count("\n", 0, block.start("shown"))
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if kind == "python":
                    exec(compile("\n" * line + shown, page, "exec"), names)
                else:
                    run_commands(shown)
            printed = out.getvalue()
    assert text.count("```") == 2 * sum(block["kind"] is not None for block in BLOCK.finditer(text)), "an odd fence"


# What pages say


@pytest.mark.newest
def test_generated_places_are_up_to_date():
    stale = [str(page) for page in docs_tables.generated() if docs_tables.rendered(page) != page.read_text("utf-8")]
    assert not stale, f"{stale}: run `make generated`"


def anchors(page):
    """The anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if path.startswith("https://"):
            continue
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), f"{path} is no file"
        assert page == "README.md" or ROOT / "docs" in target.parents, f"{path} is outside of the site"
        assert not anchor or anchor in anchors(target), f"{path} has no heading #{anchor}"


def test_every_strategy_has_a_page():
    for name, kind in docs_tables.documented().items():
        text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert f"<!-- begin: about {name} -->" in text and f"<!-- begin: options {name} -->" in text
        assert all(heading in text for heading in ("## Example", "## When to use it", "## Limits", "Ours: "))
        assert kind.__name__ in text


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = re.findall(r"^::: (\S+)$", text, re.M)
    public = {name for module in (hf_ft, advice, comparison, diagnostics, functional) for name in module.__all__}
    missing = public - {entry.rpartition(".")[2] for entry in entries} - {"diagnostics"}
    assert not missing, f"{missing}: add `::: hf_ft.NAME` to a page of docs/api/"
    for entry in entries:
        assert callable(pkgutil.resolve_name(entry)), entry
        # If a module has the same path, Griffe shows the module.
        assert not (ROOT / entry.replace(".", "/")).with_suffix(".py").exists(), f"{entry} is a module as well"


def test_navigation_has_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def files(nav):
        return [f for item in nav for v in item.values() for f in ([v] if isinstance(v, str) else files(v))]

    assert sorted(f"docs/{file}" for file in files(config["nav"])) == sorted(set(PAGES) - {"README.md"})


@pytest.mark.parametrize("page", [*PAGES, "mkdocs.yml"])
def test_pages_speak_of_the_package_only(page):
    found = FOREIGN.search((ROOT / page).read_text())
    assert not found, found and found[0]


def test_the_tests_of_promises_are_there():
    found = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(found) > 20
    assert not [(file, name) for file, name in found if f"def {name}(" not in (ROOT / file).read_text()]
