"""``hf-ft compare``: from files to a report and a plain checkpoint; refused input; several workers."""

import re
import shutil
import sys

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers import pipeline as make_pipeline

from hf_ft.cli import main
from hf_ft.cli.compare import CompareFlags, comparison_data
from hf_ft.cli.flags import DataFlags
from hf_ft.comparison import Results
from hf_ft.data.align import other_distribution
from hf_ft.data.check_results import FILE
from hf_ft.data.columns import find_columns
from hf_ft.errors import DataError
from hf_ft.testing.models import tiny_resnet
from tests.comparison.small_comparison import even, images, lasting
from tests.forked import python


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos in class folders, without a validation or test split; others of the same classes; a checkpoint."""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for folder, number in (("photos", 24), ("drawings", 5)):
        for index, name in enumerate(("cat", "dog")):
            (root / folder / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * index)
                Image.fromarray(pixels).save(root / folder / name / f"{i}.png")
    tiny_resnet().save_pretrained(root / "resnet")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "resnet")
    return root


def flags(files, output, *more):
    return [
        *("--model", str(files / "resnet"), "--dataset", str(files / "photos"), "--output_dir", str(output)),
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--use_cpu", "true"),
        *("--trials", "2", "--seeds", "1", "--most_trials", "1", "--folds", "1", "--strategies", "linear_probe,l2_sp"),
        *more,
    ]


@pytest.mark.slow
def test_from_files_to_a_report(files, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(files / "photos", photos)
    (photos / "cat" / "broken.png").write_bytes(b"no image")
    shutil.copy(files / "drawings" / "cat" / "0.png", photos / "dog" / "twin.png")
    more = [
        "--ood_dataset",
        str(files / "drawings"),
        "--on_corrupt",
        "skip",
        "--l2_sp.alpha",
        "0.3",
        "--advise",
        "True",
    ]
    with even():
        assert main(["compare", *flags(files, tmp_path / "out", *more, "--dataset", str(photos))]) == 0
    said = capsys.readouterr()
    out = " ".join(said.out.split())
    assert "skipped 1 unreadable images of" in out and "advised order: full, " in out
    assert (
        "estimate: 3 strategies x (2 trials + 1 final run" in out
        and "one seed; * is best" in out
        and "report.html" in out
    )
    assert "checks 1 sample of ood equal to " in out and "1 set of equal samples with different labels" in out
    assert make_pipeline("image-classification", model=str(tmp_path / "out" / "best"))
    results = Results.load(tmp_path / "out" / "results.json")
    assert {c.status for c in results.contenders} == {"finished"}
    assert results["l2_sp"].trials[1].params.keys() == {"optim", "learning_rate", "l2_sp.norm_mode"}  # alpha was set
    assert results["l2_sp"].configs[0]["alpha"] == 0.3
    assert results.data["sizes"]["ood"] == 10 and sum(results.data["skipped"].values()) == 1
    assert results.command.startswith("hf-ft compare --model") and results.advice["order"]
    listed = (tmp_path / "out" / FILE).read_text()
    assert results.data["checks"]["sets"] == 1 and "twin.png" in listed and str(tmp_path) not in listed
    assert "twin.png): dog" in (tmp_path / "out" / "report.md").read_text()

    assert main(["compare", "--report", str(tmp_path / "out")]) == 0
    assert results.winner in capsys.readouterr().out


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """The results of one worker."""
    folder = tmp_path_factory.mktemp("alone")
    with even():
        assert main(["compare", *flags(files, folder / "out")]) == 0
    return results(folder / "out")


def results(folder):
    content = lasting(Results.load(folder / "results.json"))
    content.pop("command")
    return content


def workers_in(log):
    return set(re.findall(r'"worker": ?"([^"]+)"', log.read_text()))


@pytest.mark.slow
def test_two_workers_share_the_trainings(files, tmp_path, alone):
    told = flags(files, tmp_path / "two", "--storage", str(tmp_path / "two.log"))
    done = python("-m", "tests.comparison.small_comparison", *told, ranks=2)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "two") == alone
    assert len(workers_in(tmp_path / "two.log")) == 2  # both did some


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(files, tmp_path, alone):
    told = flags(files, tmp_path / "two", "--storage", str(tmp_path / "two.log"), "--workers", "2")
    done = python("-m", "tests.comparison.small_comparison", *told)
    assert done.returncode == 0, done.stderr
    assert "workers: 2, 1 thread each" in done.stdout
    assert "worker 2 was killed by SIGKILL; the others take over its work" in done.stderr
    assert results(tmp_path / "two") == alone
    log = tmp_path / "two.log"
    assert len(workers_in(log)) == 2 and log.read_text().count('"worker died"') == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strategies", "full,lp"], "unknown strategy 'lp'"),
        (["--strategies", "lp_ft,lp_ft"], "--strategies names lp_ft twice"),
        (["--lp_ft.probe", "0.3"], "lp_ft is not used"),
        (["--l2_sp.alpha", "-1"], "L2SPConfig.alpha=-1"),
        (["--model", ""], "--model is missing"),
        (["--learning_rate", "0.1"], "learning_rate=0.1 cannot be set: the comparison itself sets"),
        (["--hours", "0"], "hours must be positive, got 0.0"),
        (["--trails", "3"], "Did you mean 'trials'?"),
        (["--labelled", "1"], "labelled=1"),
    ],
)
def test_refused(more, message, files, tmp_path, capsys):
    assert main(["compare", *flags(files, tmp_path / "out", *more)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "compare.db").exists()


def test_without_optuna(files, tmp_path, capsys, monkeypatch):
    """The command that installs it is printed before anything is read or trained."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("hf_ft.cli.compare.comparison_data", lambda *args: pytest.fail("the data were read"))
    assert main(["compare", *flags(files, tmp_path / "out")]) == 2
    assert "pip install 'hf-ft[search]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_validation_and_test_split(files, tmp_path):
    data = comparison_data(DataFlags(dataset=str(files / "photos")), CompareFlags(labelled=20), tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "validation": 4, "test": 12}
    rows = [set(split["__row__"][:]) for split in data.splits.values()]
    assert sum(map(len, rows)) == len(set.union(*rows))


def test_out_of_distribution_classes_are_matched_by_name(tmp_path):
    own = find_columns(images((3, 3, 3), 0))  # red, green, blue
    other = images((2, 2), 1).cast_column("label", datasets.ClassLabel(names=["blue", "red"]))
    datasets.DatasetDict({"test": other}).save_to_disk(str(tmp_path / "other"))
    found = other_distribution(str(tmp_path / "other"), None, own)
    names = other.features["label"].names
    assert [own.names[label] for label in found["label"][:]] == [names[label] for label in other["label"][:]]
    strange = other.cast_column("label", datasets.ClassLabel(names=["blue", "pink"]))
    datasets.DatasetDict({"train": strange}).save_to_disk(str(tmp_path / "strange"))
    with pytest.raises(ValueError, match="the class 'pink'"):
        other_distribution(str(tmp_path / "strange"), None, own)


def test_further_data_are_read_with_the_same_columns_and_encoding(tmp_path):
    for name, number in (("own", 12), ("other", 3)):
        rows = [f"{word} café {i},{word}" for i in range(number) for word in ("good", "bad")]
        (tmp_path / f"{name}.csv").write_text("\n".join(["body,quality", *rows]), encoding="latin-1")
    own, other = (str(tmp_path / f"{name}.csv") for name in ("own", "other"))
    given = {"text_column": "body", "label_column": "quality", "encoding": "latin-1"}
    flags = DataFlags(dataset=own, source_dataset=other, **given)
    data = comparison_data(flags, CompareFlags(ood_dataset=other), tmp_path)
    assert data.source_columns.inputs == ("body",) and data.source_columns.label == "quality"
    assert data.source["body"][0] == data.splits["ood"]["body"][0] == "good café 0"
    (tmp_path / "renamed.csv").write_text("body,verdict\na,good\nb,bad\n")
    with pytest.raises(DataError, match="has no label column among .*'verdict'.: name it 'quality'"):
        comparison_data(flags, CompareFlags(ood_dataset=str(tmp_path / "renamed.csv")), tmp_path)
    other_distribution(str(images_in_folders(tmp_path)), None, find_columns(images((3, 3), 0)), encoding="latin-1")


def images_in_folders(folder):
    """Nothing in it has an encoding."""
    for name in ("red", "green"):
        (folder / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / name / "0.png")
    return folder / "images"


def test_help_teaches(capsys):
    assert main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    for word in ("same tuning budget", "--strategies", "--hours", "--ood_dataset", "example:", "(default: 8)"):
        assert word in " ".join(said.split())  # without the wrapping of a terminal
    assert "--fsdp" not in said and len(said.splitlines()) < 190
    assert main(["compare", "--help-all"]) == 0
    assert "--fsdp" in capsys.readouterr().out
