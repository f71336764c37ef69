"""Every reader of our own JSON files raises one type of error, whatever the content."""

import json
import random
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from hf_ft.advice import Advice, Reason, Recommendation, Shift, Signals
from hf_ft.cli import main
from hf_ft.comparison.report.build import document
from hf_ft.comparison.report.card import card_section
from hf_ft.comparison.results import Results, Training
from hf_ft.core.config import FTConfig, load_configs, write_configs
from hf_ft.documents.html import html
from hf_ft.engine.deltas import load_delta
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.records import read_json, restored, stored
from hf_ft.strategies.amcf.scores import Evaluation, Generation, SwarmScores
from hf_ft.strategies.blockwise.candidates import Candidate
from hf_ft.strategies.blockwise.scores import BlockScore, BlockScores
from tests.comparison.report import made_up_results
from tests.mutations import damaged, damaged_texts

ADVICE = Advice(
    Signals(
        samples=3,
        class_counts=(1, 2),
        trainable_parameters=5,
        feature_size=4,
        logme=0.1,
        logme_constant=0.0,
        probe_accuracy=None,
        probe_balanced_accuracy=0.5,
        probe_std=0.1,
        probe_folds=2,
        batch_norm={"bn": Shift(0.1, 0.2)},
    ),
    (Recommendation("full", 1.0, (Reason("always", "samples", 3.0, 1.0),)),),
)
BLOCKS = BlockScores("block", "accuracy", 3, (0,), (BlockScore(Candidate("block1", ("net.1",), (1,), 3, 10), (0.5,)),))
SWARM = SwarmScores(
    "accuracy", ("a",), (3,), (Generation(((1.0,),), ((0.0,),), (0.5,)),), (Evaluation((1,), 0.5, steps=(0.5,)),)
)
POINT = {"epoch": 1.0, "validation": 0.5}  # an epoch whose loss is not finite
SAVED = {"advice": ADVICE, "signals": ADVICE.signals, "blocks": BLOCKS, "swarm": SWARM}


@dataclass(frozen=True)
class Inner:
    number: float


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    table: dict[str, tuple[int, ...]] = field(default_factory=dict)
    anything: Any = None


def test_types_are_restored():
    assert restored(Training, {"seed": 1, "params": {}, "validation": None, "curve": [POINT]}, "x").curve == (POINT,)
    content = {"name": "x", "kind": "a", "inner": {"number": 1}, "many": [{"number": 0.5}], "table": {"k": [1, 2]}}
    assert restored(Outer, content, "outers") == Outer("x", "a", Inner(1), (Inner(0.5),), {"k": (1, 2)})
    assert restored(Outer, {"name": "x", "kind": "b", "later": 3, "anything": [1]}, "outers").anything == [1]
    assert restored(Inner, {"number": None}, "inners", null=-1.0) == Inner(-1.0)


def test_stored_content_equals_asdict():
    record = Outer("x", "a", Inner(1.0), (Inner(0.5),), {"k": (1, 2)}, {"y": [(1, None), {"z": 2}]})
    content = stored(record)
    assert content == asdict(record) and content["table"]["k"] is record.table["k"]
    assert content["anything"] is not record.anything and restored(Outer, content, "outers") == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "these are not outers: name is 3. Use another file"),
        ({"kind": "c"}, "kind is 'c'"),
        ({"inner": 7}, "inner is 7, not an object"),
        ({"inner": {}}, "'inner.number' is missing"),
        ({"many": [{"number": True}]}, r"many\[0\].number is True"),
        ({"table": {"k": [1, "x"]}}, r"table\['k'\]\[1\] is 'x'"),
    ],
)
def test_the_message_names_the_place(change, message):
    with pytest.raises(CheckpointError, match=message):
        restored(Outer, {"name": "x", "kind": "a", **change}, "outers")


def test_every_field_if_the_content_must_be_complete():
    with pytest.raises(CheckpointError, match="'inner' is missing"):
        restored(Outer, {"name": "x", "kind": "a"}, "outers", complete=True)


@pytest.mark.parametrize("name", SAVED)
def test_damaged_content_is_refused_or_read(name):
    saved, refused = SAVED[name], 0
    assert type(saved).from_dict(json.loads(json.dumps(saved.to_dict()))) == saved
    for content in damaged(json.loads(json.dumps(saved.to_dict())), random.Random(0)):
        try:
            type(saved).from_dict(content)
        except CheckpointError:
            refused += 1
    assert refused > 30


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "x.json"
    for text in [*damaged_texts({"format": 1, "x": [1, 2]})][:8]:
        file.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"x\.json is damaged"):
            read_json(file)
    with pytest.raises(CheckpointError, match=r"no\.json is missing"):
        read_json(tmp_path / "no.json")


def test_results_are_refused_or_can_be_reported(tmp_path):
    """What can be read can be reported: errors are raised when reading, with the name of the file."""
    whole = made_up_results.comparison(seeds=2)
    whole |= {"contenders": whole["contenders"][:2], "winner": "full", "winner_seed": None}
    for number, content in enumerate(damaged(whole, random.Random(1), 60)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(content))
        try:
            results = Results.load(file)
        except CheckpointError as error:
            assert file.name in str(error)
        else:
            html(document(results)), card_section(results)


def test_a_report_of_damaged_results_ends_in_one_line(tmp_path, capsys):
    for text in damaged_texts({"format": 1, "contenders": 3}):
        (tmp_path / "results.json").write_bytes(text)
        assert main(["compare", "--report", str(tmp_path)]) == 2
        error = capsys.readouterr().err.strip()
        assert "results.json" in error and "\n" not in error


def test_a_delta_whose_header_names_no_base_is_refused(tmp_path):
    for base in ("{", "[]", "{}", '{"sha256": "x", "head": 3, "name": null}'):
        save_file({}, tmp_path / "ft_delta.safetensors", metadata={"base": base})
        with pytest.raises(CheckpointError, match=r"ft_delta\.safetensors is damaged"):
            load_delta(torch.nn.Linear(1, 1), tmp_path)


def test_damaged_configs_are_refused_or_read(tmp_path):
    configs = [FTConfig.from_dict({"ft_type": name}) for name in ("l2_sp", "blockwise", "amcf")]
    write_configs(tmp_path, configs)
    file = tmp_path / "ft_config.json"
    content = json.loads(file.read_text())
    texts = [json.dumps(one).encode() for one in damaged(content, random.Random(2))]
    for text in (*texts, *damaged_texts(content)):
        file.write_bytes(text)
        try:
            load_configs(tmp_path)
        except OptionError as error:
            assert str(error)
