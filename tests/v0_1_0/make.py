"""Write the files of this folder, which later versions must still be able to read: `python -m tests.v0_1_0.make`.

Run with hf_ft 0.1.0 at commit f6b4b33. Do not run it again with a later version: files written by the version under
test prove nothing. tests/test_v0_1_0.py loads the files with the models, data and settings below. Data are whole
numbers over a power of two, and searches start from weights in files, so that hashes are the same everywhere.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import torch
import transformers as hf
from peft import LoraConfig
from safetensors.torch import save_file

import hf_ft
from hf_ft.cli import main
from hf_ft.core.options import UNKNOWN
from hf_ft.testing import tiny_resnet

HERE = Path(__file__).parent
CLASSES = 3
SMALL = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}


def as_before(config):
    """A config of later versions, in which options added since have the behaviour of 0.1.0."""
    fields = [field for field in dataclasses.fields(config) if field.metadata.get("formerly", UNKNOWN) is not UNKNOWN]
    default = [field for field in fields if getattr(config, field.name) == field.default]
    return dataclasses.replace(config, **{field.name: field.metadata["formerly"] for field in default})


DAFT = hf_ft.DAFTConfig(head_lr=0.05, statistics="pooled", norm_mode="train")  # then its default mode
TRAINED = (DAFT, hf_ft.L2SPConfig(alpha=0.2, beta=0.05))
ONCE = {"search_seeds": 1}  # then the default
CHANGED = hf_ft.BlockwiseConfig(**ONCE, block="stage1", head_lr=0.02)
# What is interrupted, and after which of its eight steps.
INTERRUPTED = {
    "soft": (as_before(hf_ft.SoftConfig(until=0.75, weight=0.5)), 4),
    "lp_ft": ((as_before(hf_ft.LPFTConfig(head_lr=1e-2)), hf_ft.L2SPConfig()), 6),
    "adapters": (as_before(hf_ft.BlockwiseConfig(**ONCE, block="stage1", head_lr=None, tuner=LoraConfig(r=2))), 4),
}
SEARCHES = {
    "blockwise": as_before(hf_ft.BlockwiseConfig(**ONCE, metric="loss", search_epochs=1, head_lr=None)),
    "amcf": as_before(hf_ft.AMCFConfig(metric="loss", search_epochs=1, particles=3, iterations=2)),
}
SEARCHED = {"blockwise": "trained", "amcf": "ensemble"}
STUDIES = {"blockwise": "block_search.db", "amcf": "swarm_search.db"}
COMPARE = [
    *("compare", "--model", "resnet", "--dataset", "images", "--output_dir", "compare"),
    *("--strategies", "linear_probe,daft", "--trials", "2", "--seeds", "2", "--most_trials", "1"),
    *("--num_train_epochs", "3", "--per_device_train_batch_size", "4", "--use_cpu", "true"),
]

# Every registered strategy, with every option different from its default.
COMMON = {"batch_norm_momentum": 0.25, "head": "classifier", "blocks": r"stages\.\d+"}
CONFIGS = (
    hf_ft.AMCFConfig(
        **COMMON,
        source_models=("first", "second"),
        consistency=0.3,
        frozen=(1, 2),
        prediction="mean_probability",
        freeze_norm_statistics=False,
        particles=4,
        iterations=3,
        search_epochs=2,
        search_budget=9,
        patience=2,
        halving=True,
        validation=0.3,
        metric="macro_f1",
        search_seed=5,
        storage="swarm.log",
    ),
    hf_ft.AttentionTransferConfig(**COMMON, beta=100.0, layers=("resnet.encoder.stages.1",)),
    hf_ft.BSSConfig(**COMMON, eta=0.01, k=2),
    hf_ft.BlockwiseConfig(
        **COMMON,
        block=-1,
        scheme="window",
        length=2,
        top=3,
        head_lr=0.1,
        tuner=LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"]),
        search_epochs=3,
        search_seeds=2,
        validation=0.5,
        metric="balanced_accuracy",
        halving=True,
        baselines=False,
        storage="sqlite:///blocks.db",
    ),
    hf_ft.CoTuningConfig(
        **COMMON, weight=1.5, relationship="reverse", temperature=2.0, source_label_map={"a": 0, "b": 2}
    ),
    hf_ft.DAFTConfig(
        **COMMON, convert_batch_norm=False, statistics="pooled", zero_head=False, head_lr=None, norm_mode="eval"
    ),
    hf_ft.DELTAConfig(
        **COMMON,
        alpha=0.1,
        beta=0.0,
        weights="uniform",
        reduction="sum",
        layers=("resnet.embedder",),
        batches=2,
        head_epochs=3,
        head_lr=0.5,
    ),
    hf_ft.FullConfig(**COMMON, head_lr=0.1, norm_mode="eval"),
    hf_ft.GradualUnfreezingConfig(**COMMON, stages=3, decay=1.5),
    hf_ft.L2SPConfig(**COMMON, alpha=0.5, beta=0.0),
    hf_ft.LPFTConfig(**COMMON, probe=0.25, head_lr=0.1, norm_mode="auto"),
    hf_ft.LayerDecayConfig(**COMMON, decay=0.5),
    hf_ft.LinearProbeConfig(**COMMON),
    hf_ft.LwFConfig(**COMMON, weight=2.0, temperature=2.0),
    hf_ft.SoftConfig(
        **COMMON,
        schedule="cosine",
        weight=0.5,
        until=0.75,
        source_ratio=0.5,
        source_forward="separate",
        source="head",
        source_label_map="by_name",
        distillation_weight=2.0,
        temperature=2.0,
    ),
    hf_ft.TREDConfig(
        **COMMON,
        criterion="max_mmd",
        disentangler="branches",
        alpha=0.1,
        beta=0.0,
        reconstruction=1.0,
        mmd=0.2,
        information=0.3,
        bottleneck=0.5,
        epochs=4,
        lr=0.01,
        layer="resnet.encoder",
    ),
)


# For loading the files


def pixels(count, seed=0):
    """Images of the models' size, (count, 3, 32, 32)."""
    return (np.random.RandomState(seed).randint(-128, 128, (count, 3, 32, 32)) / 64).astype(np.float32)


def data(count, classes=CLASSES, seed=0, columns=("pixel_values",)):
    """Training samples; every class is a little brighter than the previous one."""
    labels = np.arange(count) % classes
    rows = {name: pixels(count, seed + place) + labels[:, None, None, None] / 2 for place, name in enumerate(columns)}
    return datasets.Dataset.from_dict({**rows, "labels": labels}).with_format("torch")


def write_images(folder):
    """Photos for a comparison, in three splits."""
    random = np.random.RandomState(0)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["red", "green", "blue"]))
    splits = datasets.DatasetDict()
    for name, count in (("train", 24), ("validation", 12), ("test", 12)):
        labels = np.arange(count) % CLASSES
        values = random.randint(0, 100, (count, 32, 32, 3))
        values[np.arange(count), :, :, labels] += 100
        rows = {"image": list(values.astype(np.uint8)), "label": labels}
        splits[name] = datasets.Dataset.from_dict(rows, features=features)
    splits.save_to_disk(str(folder))


def arguments(folder, **more):
    """Eight steps of plain SGD, whose rounding errors do not grow."""
    return hf.TrainingArguments(
        str(folder),
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **more,
        },
    )


def base(folder="resnet"):
    """The pretrained model with a new head, and its old head with five classes beside it."""
    return hf_ft.from_pretrained(str(folder), num_labels=CLASSES)


def interrupted(name, folder, model="resnet"):
    """The trainer of a run that was interrupted."""
    strategy, step = INTERRUPTED[name]
    args = arguments(folder, save_strategy="steps", save_steps=step)
    source = {"source_dataset": data(20, 5, seed=7)} if name == "soft" else {}
    return hf_ft.FTTrainer(base(model), args, strategy=strategy, train_dataset=data(32), **source)


def searching(name, folder, root="."):
    """A trainer whose strategy searches first, from a model whose head is read from a file."""
    model = hf.AutoModelForImageClassification.from_pretrained(f"{root}/{SEARCHED[name]}")
    train = data(24, columns=getattr(model, "input_names", ("pixel_values",)))
    return hf_ft.FTTrainer(model, arguments(folder), strategy=SEARCHES[name], train_dataset=train)


def drawn():
    """What torch draws for a new head, which differs between processors."""
    return torch.empty(24).uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, inputs):
    """The logits of a model in evaluation mode for fixed inputs."""
    return model.eval()(**inputs).logits


def photos():
    """Two photos for a processor."""
    return list(np.random.RandomState(3).randint(0, 256, (2, 40, 36, 3)).astype(np.uint8))


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# Writing them


def write_base():
    processor = hf.ViTImageProcessorPil(
        size={"height": 32, "width": 32}, do_resize=False, rescale_factor=1 / 128, do_normalize=False
    )
    for name, seed in (("resnet", 0), ("other", 1)):
        tiny_resnet(num_labels=5, seed=seed, **SMALL).save_pretrained(name)
        processor.save_pretrained(name)
        processor = hf.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0, resample=0)


def write_trained():
    trainer = hf_ft.FTTrainer(base(), arguments("run"), strategy=TRAINED, train_dataset=data(32))
    trainer.train()
    trainer.save_model("trained")
    return logits(trainer.model, {"pixel_values": torch.from_numpy(pixels(4, 9))})


def write_delta():
    trainer = hf_ft.FTTrainer(base(), arguments("run"), strategy=CHANGED, train_dataset=data(32))
    trainer.train()
    trainer.save_delta("delta")
    return logits(trainer.model, {"pixel_values": torch.from_numpy(pixels(4, 9))})


def write_interrupted(name):
    trainer = interrupted(name, name)
    trainer.train()
    for later in {8, 2 * INTERRUPTED[name][1]}:
        shutil.rmtree(f"{name}/checkpoint-{later}", ignore_errors=True)
    return snapshot(trainer.model)


def write_configs():
    """Write configs in the form of a checkpoint with all of them."""
    content = {"strategies": []}
    for config in CONFIGS:
        config.save_pretrained("configs")
        written = json.loads(Path("configs/ft_config.json").read_text())
        content = {**written, "strategies": [*content["strategies"], *written["strategies"]]}
    Path("configs/ft_config.json").write_text(json.dumps(content, indent=2) + "\n")


def write_ensemble():
    model, processor = hf_ft.load_sources(["resnet", "other"], num_labels=CLASSES)
    model.save_pretrained("ensemble")
    processor.save_pretrained("ensemble")
    return logits(model, processor(photos(), return_tensors="pt"))


def write_study(name):
    trainer = searching(name, name)
    found = trainer.measure()[name].info
    pack(Path(name) / STUDIES[name])
    return found


def write_comparison():
    write_images("images")
    assert main(COMPARE) == 0
    pack(Path("compare/compare.db"))
    for file in ("report.html", "report.md", ".lock"):
        Path("compare", file).unlink(missing_ok=True)


def pack(file):
    """Compress an SQLite file, which consists mostly of empty pages."""
    file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    file.unlink()


def unpack(file, to):
    to.write_bytes(gzip.decompress(file.read_bytes()))


def write_all():
    write_base()
    tensors = {"trained.logits": write_trained(), "delta.logits": write_delta(), "ensemble.logits": write_ensemble()}
    tensors["drawn"] = drawn()
    for name in INTERRUPTED:
        tensors |= {f"{name}.{key}": tensor for key, tensor in write_interrupted(name).items()}
    save_file(tensors, "expected.safetensors")
    write_configs()
    Path("searches.json").write_text(json.dumps({name: write_study(name) for name in SEARCHES}, indent=1) + "\n")
    write_comparison()
    # Only for people, specific to this machine, or created by the tests.
    for file in Path().rglob("training_args.bin"):
        file.unlink()
    for name in INTERRUPTED:
        for card in Path(name).rglob("README.md"):
            card.unlink()
    for folder in ("images", "other", "run"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Names in files are as short as possible: those of folders next to this script.
    with mock.patch("socket.gethostname", return_value="host"), contextlib.chdir(HERE):
        os.environ["HF_HUB_OFFLINE"] = "1"
        write_all()
