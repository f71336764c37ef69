"""The oldest versions: setup.cfg, `make test-oldest` and the docs agree."""

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def oldest():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def bounds(text):
    found = {}
    for line in text.split():
        (bound,) = Requirement(line).specifier
        assert bound.operator == ">=", line
        found[Requirement(line).name] = bound.version
    return found


def test_the_oldest_allowed_versions_are_tested():
    config, tried = setup(), oldest()
    required = bounds(config["options"]["install_requires"])
    assert not required.keys() - tried.keys()
    for name in ("audio", "augment", "search", "tensorboard"):
        required |= bounds(config["options.extras_require"][name])
    assert {name: Version(bound) for name, bound in required.items()} == {
        name: Version(tried[name]) for name in required
    }


def test_the_docs_say_so():
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", page, re.M))
    assert rows.pop("Python") == setup()["options"]["python_requires"].removeprefix(">=")
    assert rows and rows == {name: oldest()[name] for name in rows}


def test_the_changelog_has_a_heading_for_this_version():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "hf_ft" / "version.py").read_text())[1]
    first = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert re.fullmatch(rf"{re.escape(version)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", first)
