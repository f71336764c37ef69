"""A checkpoint gets its name when it is complete, not before."""

import os

import pytest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from hf_ft import FTTrainer
from hf_ft.engine.checkpoint import unshared
from hf_ft.testing import same_tensors
from hf_ft.trainer.checkpointing import written_whole


@pytest.fixture
def waits():
    return []


def write(final, text, waits, writes=True):
    with written_whole(final, os.getpid(), writes, lambda: waits.append(final.exists())) as folder:
        (folder / "file").write_text(text)


def test_it_is_renamed_when_all_processes_have_written(tmp_path, waits):
    write(tmp_path / "checkpoint-1", "one", waits)
    assert waits == [False, False, True]
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "one"


def test_one_with_its_name_is_replaced(tmp_path, waits):
    for text in ("one", "two"):
        write(tmp_path / "checkpoint-1", text, waits)
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_fails_leaves_no_checkpoint_and_the_old_one(tmp_path, waits):
    write(tmp_path / "checkpoint-1", "one", waits)
    with (
        pytest.raises(RuntimeError),
        written_whole(tmp_path / "checkpoint-1", os.getpid(), True, lambda: None) as folder,
    ):
        (folder / "file").write_text("two")
        raise RuntimeError("no space left")
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "one"
    write(tmp_path / "checkpoint-1", "three", waits)  # what was left behind does not interfere
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_other_processes_write_into_the_same_folder(tmp_path, waits):
    with written_whole(tmp_path / "checkpoint-1", os.getpid(), True, lambda: None) as folder:
        write(tmp_path / "checkpoint-1", "two", waits, writes=False)
        assert (folder / "file").read_text() == "two"


def test_the_trainer_is_one_class():
    assert FTTrainer.__bases__ == (Trainer,)


def test_modules_that_share_weights_are_saved_under_both_names(tmp_path):
    shared = nn.Linear(3, 2)
    modules = nn.ModuleDict({"one": shared, "other": shared, "third": nn.Linear(3, 2)})
    save_file(unshared(modules.state_dict()), tmp_path / "modules.safetensors")
    same_tensors(load_file(tmp_path / "modules.safetensors"), modules.state_dict())
