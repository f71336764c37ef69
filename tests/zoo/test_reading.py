"""Damaged files of a pretrained model: each kind of file has one type of error, which names the file."""

import contextlib
import json
import random
import shutil

import pytest
import torch
from transformers import ViTImageProcessorPil

from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.weight_files import damaged_file, has_whole_weights
from hf_ft.testing.models import tiny_resnet
from hf_ft.zoo.models import load_model
from hf_ft.zoo.reading import read_config
from hf_ft.zoo.sources import load_sources
from tests.mutations import damaged, damaged_texts

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    tiny_resnet().save_pretrained(folder / "one")
    tiny_resnet().save_pretrained(folder / "shards", max_shard_size="20KB")
    for name in ("one", "shards"):
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    return folder


@pytest.fixture
def model(intact, tmp_path):
    return shutil.copytree(intact / "one", tmp_path / "model")


@pytest.fixture
def shards(intact, tmp_path):
    return shutil.copytree(intact / "shards", tmp_path / "shards")


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("load", [load_model, lambda name: load_sources([name, name])])
def test_truncated_weights_are_named(model, load):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], POINTER):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged \(.*Delete it, and download"):
            load(str(model))


def test_truncated_shards_and_index_are_named(shards):
    load_model(str(shards))
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for text in (*damaged_texts(content), b'{"weight_map": {"a": 3}}'):
        index.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            load_model(str(shards))
        assert not has_whole_weights(shards)
    index.write_text(json.dumps(content))
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    cut(shard, 200)
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(str(shards))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"the weights of .* cannot be loaded: .*{shard.name}"):
        load_model(str(shards))


def test_a_truncated_pickle_is_named(model):
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    torch.save(tiny_resnet().state_dict(), file)
    load_model(str(model))
    assert damaged_file(model) is None
    for size in (20_000, 100, 0):
        cut(file, size)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged"):
            load_model(str(model))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_damaged_config_is_refused_or_read(model, name):
    file = model / name
    content = json.loads(file.read_text())
    texts = [json.dumps(one).encode() for one in damaged(content, random.Random(0), 30)]
    for text in (*texts, *damaged_texts(content)):
        file.write_bytes(text)
        try:
            read_config(str(model)) if name == "config.json" else load_model(str(model))
        except OptionError as error:
            assert str(model) in str(error) and "\n" not in str(error)


def test_a_model_that_does_not_exist():
    with pytest.raises(OptionError, match="cannot read the model './nowhere'.*It may be a Hub id"):
        load_model("./nowhere")


def test_no_code_of_a_model_is_executed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model / "code.py").write_text("open('executed', 'w')\n")
    content = json.loads((model / "config.json").read_text())
    maps = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    for changed in ({"auto_map": maps}, {"auto_map": maps, "model_type": "of nobody"}):
        (model / "config.json").write_text(json.dumps(content | changed))
        with contextlib.suppress(OptionError):
            load_model(str(model))
    assert not (tmp_path / "executed").exists()
