"""``hf_ft.compare`` on text, numbers, several labels per row, and several source models."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_ft import AMCFConfig, FTTrainer, L2SPConfig, OptionError
from hf_ft.comparison import training
from hf_ft.testing.models import tiny_bert, tiny_resnet
from tests.comparison.small_comparison import images, run, splits

WORDS = ("[PAD]", "[UNK]", "good", "bad", "film")


def reviews(count, label):
    """Reviews of two kinds, with a label made from the kind and the number."""
    random = np.random.default_rng(count)
    kinds = random.integers(0, 2, count)
    texts = [f"{WORDS[2 + kind]} film" for kind in kinds]
    if label == "class":
        features = Features(text=Value("string"), label=ClassLabel(names=["good", "bad"]))
        return Dataset.from_dict({"text": texts, "label": kinds}, features=features)
    if label == "number":
        return Dataset.from_dict({"text": texts, "label": (3.0 * kinds + random.normal(0, 0.1, count)).tolist()})
    features = Features(text=Value("string"), label=List(ClassLabel(names=["a", "b", "c"])))
    return Dataset.from_dict({"text": texts, "label": [[int(kind), 2] for kind in kinds]}, features=features)


def load_bert(classes):
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    return lambda seed, keep: (tiny_bert(num_labels=classes, seed=seed), tokenizer)


def test_a_warm_up_where_pretrained_weights_train_without_batch_statistics(tmp_path, monkeypatch):
    seen = {}

    class Trainer(FTTrainer):
        def __init__(self, model, args, strategy, **given):
            seen.setdefault("+".join(config.ft_type for config in strategy), args.warmup_steps)
            super().__init__(model, args, strategy=strategy, **given)

    monkeypatch.setattr(training, "FTTrainer", Trainer)
    once = {"trials": 0, "seeds": 1, "num_train_epochs": 1}
    run(tmp_path / "bert", "linear_probe,lp_ft", model=load_bert(2), data=DatasetDict(
        {name: reviews(count, "class") for name, count in (("train", 16), ("validation", 8), ("test", 10))}
    ), **once)  # fmt: skip
    assert seen == {"full": 0.1, "linear_probe": 0, "lp_ft": 0.1}
    seen.clear()
    run(tmp_path / "resnet", {"kept": L2SPConfig(norm_mode="eval"), "lp_ft": "lp_ft"}, **once)
    assert seen == {"full": 0, "l2_sp": 0.1, "lp_ft": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "classes", "metric"),
    [("class", 2, "balanced_accuracy"), ("number", 1, "mse"), ("several", 3, "macro_f1")],
)
def test_text(label, classes, metric, tmp_path):
    data = DatasetDict({n: reviews(c, label) for n, c in (("train", 16), ("validation", 8), ("test", 10))})
    results = run(tmp_path, "linear_probe,lp_ft", model=load_bert(classes), data=data, trials=2, seeds=1)
    assert results.metric == metric and {c.status for c in results.contenders} == {"finished"}
    assert results.greater_is_better == (metric != "mse")
    assert results["full"].space.get("optim") is None and results["full"].trials[0].params["learning_rate"] == 3e-5
    better = min if metric == "mse" else max
    for contender in results.contenders:
        trials = [trial.validation for trial in contender.trials]
        assert trials[contender.chosen] == better(trials)
    finals = {c.name: c.runs[0].validation for c in results.contenders}
    assert finals[results.winner] == better(finals.values())
    one = results["full"].runs[0]
    assert load_file(tmp_path / one.logits)["test"].shape == (10, classes)
    assert bool(one.calibration) == (label == "class") and one.temperature is None  # of 8 validation samples
    assert not (tmp_path / "best" / "ft_calibration.json").exists()
    report = (tmp_path / "report.md").read_text()
    assert [text in report for text in ("## Calibration", "Without a temperature: all runs")] == [label == "class"] * 2
    assert (tmp_path / "report.html").is_file() and (tmp_path / "best" / "tokenizer.json").is_file()


@pytest.mark.parametrize("label", ["number", "several"])
def test_mistakes_without_one_class_per_sample_have_no_thumbnails(label):
    data = DatasetDict({n: reviews(c, label) for n, c in (("train", 16), ("validation", 8), ("test", 10))})
    with pytest.raises(OptionError, match="thumbnails=True: they belong to the list of mistakes"):
        run("unused", model=load_bert(1), data=data, thumbnails=True)


@pytest.mark.slow
def test_several_source_models_and_one_that_is_unavailable(tmp_path):
    for name, depths in (("one", [1, 2]), ("two", [1, 1])):
        tiny_resnet(depths=depths).save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / name)
    both = AMCFConfig(source_models=(str(tmp_path / "one"), str(tmp_path / "two")))
    gone = AMCFConfig(source_models=(str(tmp_path / "one"), str(tmp_path / "nowhere")), frozen=(0, 0))
    results = run(tmp_path / "out", {"amcf": both, "gone": gone}, model=str(tmp_path / "one"), seeds=1, trials=1)
    amcf = results["amcf"]
    assert amcf.status == "finished" and amcf.found["swarm"] and len(amcf.found["frozen"]) == 2
    assert results["gone"].status == "cannot run" and "nowhere" in results["gone"].reason
    assert "nowhere" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_a_head_is_new_for_all_alike(tmp_path):
    """Also for a checkpoint with other classes: strategies that keep its head start with the same new one."""
    from hf_ft.comparison.task import Benches, Data
    from hf_ft.data.columns import find_columns

    tiny_resnet(num_labels=5).save_pretrained(tmp_path / "five")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "five")
    data = splits(test=(2, 2, 2))
    bench = Benches(str(tmp_path / "five"), Data(data, find_columns(images((2, 2, 2), 0))), None, None).get(())
    for seed in (1, 2):
        plain, keeping = (bench.load(seed, keep).state_dict() for keep in (False, True))
        assert all((plain[name] == keeping[name]).all() for name in plain)
    assert any((bench.load(1, False).state_dict()[n] != bench.load(2, False).state_dict()[n]).any() for n in plain)
