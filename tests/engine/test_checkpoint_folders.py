"""A run is resumed only from a checkpoint whose files are complete and intact."""

import json
import os
import shutil
import zipfile

import pytest

from hf_ft import CheckpointError
from hf_ft.engine.checkpoint_folders import (
    check_complete,
    files_written_whole,
    is_complete,
    last_checkpoint,
    move_into_place,
    seal,
)
from hf_ft.processes import process_name
from hf_ft.testing import tiny_resnet, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose term has parameters, and which reads source data."""
    folder = tmp_path_factory.mktemp("run")
    train(tiny_resnet(), "soft", folder, max_steps=2, save_strategy="steps", save_steps=1)
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    return shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")


FILES = (  # each contains a part of what resuming needs
    "model.safetensors config.json ft_config.json ft_state.safetensors ft_modules.safetensors ft_streams_0.json "
    "optimizer.pt scheduler.pt rng_state.pth trainer_state.json"
)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def zeroed(file):
    """As a power failure may leave it: with its full length, without its content."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("name", FILES.split())
def test_a_file_that_is_missing_or_damaged_is_named(name, checkpoint):
    assert is_complete(checkpoint)
    whole = (checkpoint / name).read_bytes()
    for damage in (type(checkpoint).unlink, cut, emptied, zeroed):
        damage(checkpoint / name)
        with pytest.raises(ValueError, match=f"{checkpoint}.*{name}"):
            check_complete(checkpoint)
        (checkpoint / name).write_bytes(whole)
    assert is_complete(checkpoint)


def test_a_changed_byte_of_the_optimizer_is_noticed(checkpoint):
    file = checkpoint / "optimizer.pt"
    with zipfile.ZipFile(file) as archive:
        inside = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(file.read_bytes())
    content[inside.header_offset + inside.file_size] ^= 255
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="optimizer.pt is damaged.*checksum"):
        check_complete(checkpoint)


def test_the_previous_one_is_used_and_the_reason_reported(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoint-2" / "optimizer.pt").unlink()
    with caplog.at_level("WARNING", logger="hf_ft"):
        assert last_checkpoint(copy).name == "checkpoint-1"
    assert "skipping checkpoint-2: " in caplog.text and "optimizer.pt is missing" in caplog.text


def test_what_is_not_needed_may_be_missing(checkpoint):
    for name in ("README.md", "training_args.bin"):
        (checkpoint / name).unlink()
    assert is_complete(checkpoint)


def test_a_checkpoint_without_a_list_needs_the_same_training_state(checkpoint):
    (checkpoint / "ft_files.json").unlink()
    assert is_complete(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        moved = (checkpoint / name).rename(checkpoint / "away")
        assert not is_complete(checkpoint)
        moved.rename(checkpoint / name)


def test_the_random_state_of_each_rank_is_needed(checkpoint):
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    seal(checkpoint)
    assert is_complete(checkpoint)
    (checkpoint / "rng_state_1.pth").unlink()
    with pytest.raises(CheckpointError, match="rng_state_1.pth is missing"):
        check_complete(checkpoint)


def test_what_a_killed_process_was_writing_is_deleted_by_the_next(tmp_path):
    place, _, started = process_name().split("-")
    (tmp_path / f"incomplete-{place}-{2**22 + 1}-{started}-files").mkdir()
    with files_written_whole(tmp_path) as written:
        (written / "model.safetensors").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_all_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    written = tmp_path / "incomplete-checkpoint-1"
    (written / "member_0").mkdir(parents=True)
    for name in ("model.safetensors", "member_0/config.json"):
        (written / name).write_text("{}")
    flushed, opened = [], {}
    open_file = os.open

    def opening(path, *arguments):
        number = open_file(path, *arguments)
        opened[number] = path
        return number

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append((opened[number].name, written.exists())))
    seal(written)
    assert json.loads((written / "ft_files.json").read_text()) == ["member_0/config.json", "model.safetensors"]
    move_into_place(written, tmp_path / "checkpoint-1")
    names = ["ft_files.json", "model.safetensors", "member_0", "config.json", written.name]
    assert sorted(flushed[:-1]) == sorted((name, True) for name in names)
    assert flushed[-1] == (tmp_path.name, False)
