"""Flags that would have no effect, and values that would be misread, are refused."""

import re
import sys

import pytest

from hf_ft.cli import main
from hf_ft.cli.checks import check_flags, check_task
from hf_ft.cli.flags import DataFlags
from hf_ft.data import augment
from hf_ft.errors import OptionError


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("train", "--source_split x", "--source_split x has no effect without --source_dataset: add that"),
        ("compare", "--ood_split x", "--ood_split x has no effect without --ood_dataset: add that"),
        ("compare", "--on_corrupt no", "--on_corrupt no is unknown: choose one of refuse, skip."),
        ("search-blocks", "--on_corrupt no", "--on_corrupt no is unknown: choose one of refuse, skip."),
        ("compare", "--augment heavy", "--augment heavy is unknown: choose one of none, basic, tri"),
        ("train", "--mixup -1", "mixup=-1.0 must be 0, for none, or a positive number, such as 0.2."),
        ("compare", "--cutmix inf", "cutmix=inf must be 0, for none, or a positive number, such as 1."),
        (
            "train",
            "--mixup 1 --frozen_cache always",
            "frozen_cache='always' would train on recorded samples, which mix",
        ),
        ("search-blocks", "--mixup 1", "--mixup 1.0 has no effect: candidates"),
        ("compare", "--trials 0 --learning_rates 1e-4,1", "--learning_rates 1e-4,1 has no effect: --trials is 0."),
        ("compare", "--report x --seeds 3", "--seeds 3 has no effect: --report only rebuilds the report"),
        ("compare", "--strategies l2_sp --source_dataset x", "--source_dataset x has no effect: no strategy chosen"),
        ("train", "--strategy l2_sp --source_dataset x", "--source_dataset x has no effect: no strategy chosen"),
        ("train", "--frozen_cache never --frozen_cache_disk_gb 3", "--frozen_cache_disk_gb 3.0 has no effect: --froz"),
        (
            "train",
            "--prediction_loss_only true",
            "--prediction_loss_only True leaves no logits to score: leave it out.",
        ),
        ("train", "--label_names label", "--label_names label: models call them labels, whatever the column. Leave"),
        ("train", "--split_seed -1", "--split_seed -1 is not a seed: use a number from 0 to 4294967295."),
        ("compare", "--sampling_seed -1", "sampling_seed must be at least 0, got -1."),
        ("train", "--max_length 0", "--max_length 0 is not a number of tokens: use at least 1, or leave it out."),
        ("predict", "--max_length 0", "--max_length 0 is too small: set it to at least 1."),
        ("train", "--revision main", "--revision main has no effect: it refers to a model on the Hub"),
        ("advise", "--learning_rate 0.1", "--learning_rate 0.1 has no effect: advise trains nothing."),
        ("advise", "--class_weights balanced", "--class_weights balanced has no effect: advise trains nothing."),
        ("search-blocks", "--num_train_epochs 3", "--num_train_epochs 3.0 has no effect: each candidate trains for"),
    ],
)
def test_on_the_command_line(command, flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--model", "mobilenet_v2", "--dataset", "elpv"] if "--report" not in flags else []
    assert main([command, *where, *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_report_of_nothing(tmp_path, capsys):
    for command in ("compare", "demo"):
        assert main([command, "--report", str(tmp_path)]) == 2
        assert "it contains no results.json" in capsys.readouterr().err


def test_in_a_file(tmp_path, capsys):
    """YAML's "no" is a boolean."""
    (tmp_path / "run.yaml").write_text("model: m\ndataset: d\non_corrupt: no\n")
    assert main(["compare", str(tmp_path / "run.yaml")]) == 2
    assert "--on_corrupt False is unknown: choose one of refuse, skip." in capsys.readouterr().err


def test_flags_with_an_effect(tmp_path):
    check_flags({"source_dataset": "a", "source_split": "b", "ood_dataset": "c", "ood_split": "d", "trials": 3})
    check_flags({"source_split": None, "trials": 0, "frozen_cache": "auto", "frozen_cache_disk_gb": 3.0})
    check_flags({"model": "microsoft/resnet-18", "revision": "main"})
    with pytest.raises(OptionError, match=re.escape(f"--model {tmp_path} is a folder. Leave it out.")):
        check_flags({"model": str(tmp_path), "revision": "main"})


@pytest.mark.parametrize(
    ("flags", "task", "refused"),
    [
        ({"max_length": 5}, "image", "--max_length 5"),
        ({"text_column": "t", "image_column": "i"}, "image", "--text_column t"),
        ({"image_size": 8}, "text", "--image_size 8"),
        ({"on_corrupt": "skip"}, "text", "--on_corrupt skip"),
        ({"image_size": 8, "on_corrupt": "skip", "image_column": "i"}, "image", None),
        ({"max_length": 5, "text_column": "t"}, "text", None),
    ],
)
def test_flags_of_the_other_kind_of_data(flags, task, refused):
    if refused is None:
        return check_task(DataFlags(dataset="d", **flags), task)
    with pytest.raises(OptionError, match=f"{refused} has no effect: --dataset d is read as {task}. Leave it out."):
        check_task(DataFlags(dataset="d", **flags), task)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_policy_without_its_package_is_refused_before_anything_is_loaded(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "kornia", None)
    augment._kornia.cache_clear()
    assert main([command, "--model", "no/such", "--dataset", "/no/such", "--augment", "trivial"]) == 2
    assert "pip install 'hf-ft[augment]'" in capsys.readouterr().err
