"""Small models and images for comparisons, and a process that can be killed in the middle of a comparison."""

import copy
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from optuna.trial import TrialState
from transformers import ViTImageProcessorPil

from hf_ft.cli import main
from hf_ft.comparison import Settings, compare
from hf_ft.comparison.cost import Clock
from hf_ft.comparison.runner import Runner
from hf_ft.processes import process_name
from hf_ft.testing.models import tiny_resnet

NAMES = ("red", "green", "blue")
# For tests that depend neither on several seeds nor on epochs.
SHORT = {"seeds": 1, "num_train_epochs": 1}
SETTINGS = ("hours", "metric", "learning_rates", "storage", "retry_failed", "folds", "patience", "mixup", "cutmix")
SETTINGS += ("soup_of", "thumbnails")


def images(counts, seed):
    """Noise with a tint for each class; ``counts`` images of each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = rng.integers(0, 120, (len(labels), 16, 16, 3))
    pixels[np.arange(len(labels)), :, :, labels] += 60
    order = rng.permutation(len(labels))
    features = Features(image=Image(), label=ClassLabel(names=list(NAMES[: len(counts)])))
    content = {"image": list(pixels[order].astype(np.uint8)), "label": labels[order]}
    return Dataset.from_dict(content, features=features)


def splits(train=(8, 8, 8), validation=(4, 4, 4), test=(6, 6, 6), **more):
    parts = {"train": train, "validation": validation, "test": test, **more}
    return DatasetDict({name: images(counts, seed) for seed, (name, counts) in enumerate(parts.items())})


def load(classes=3):
    """A loader for ``compare`` that makes a network of two blocks."""
    pretrained = tiny_resnet(num_labels=classes, seed=0, depths=[1, 1])

    def loader(seed, keep):
        model = copy.deepcopy(pretrained)
        random = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            model.classifier[-1].weight.normal_(std=0.02, generator=random)
        return model, ViTImageProcessorPil(size={"height": 32, "width": 32})

    return loader


class Even(Clock):
    """Every training run costs the same, so that repetitions have the same number of trials."""

    def on_train_end(self, *args, **kwargs):
        super().on_train_end(*args, **kwargs)
        self.compute = 1.0


def even():
    """Within this context, all training runs cost the same."""
    return mock.patch("hf_ft.comparison.training.Clock", Even)


def any_temperature():
    """Within this context, a handful of validation samples is enough for any temperature."""
    return mock.patch.multiple("hf_ft.inference.calibration", FEWEST=1, LOWEST=1e-4, HIGHEST=1e4)


def run(folder, strategies="linear_probe", *, trials=2, seeds=2, data=None, told=None, model=None, **more):
    """A comparison in a second or two. A strategy never gets more trials than full fine-tuning."""
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True}
    settings = {"most_trials": 1, "distortion_samples": 8, "folds": 1}
    settings |= {name: more.pop(name) for name in SETTINGS if name in more}
    with even():
        return compare(
            model or load(),
            data or splits(),
            strategies,
            output_dir=folder,
            settings=Settings(trials=trials, seeds=seeds, **settings),
            command="made by a test",
            tell=told or (lambda line: None),
            **arguments | more,
        )


def lasting(results):
    """What is the same in every repetition: no times, no memory, no warnings issued once per process."""
    content = json.loads(json.dumps(results.to_dict()))
    for contender in content["contenders"]:
        for training in (*contender["trials"], *contender["runs"]):
            for name in ("seconds", "compute", "evaluation_seconds", "peak_memory_mb", "warnings"):
                training.pop(name)
        for name in ("measure_seconds", "allowed_seconds"):
            contender.pop(name)
    content.pop("seconds")
    return content


def killed_after(folder, trainings):
    """Dies by kill -9 after this many training runs."""
    told = []

    def tell(line):
        told.append(line)
        if sum(line.startswith("[") for line in told) == trainings:
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, told=tell, **SHORT)


def shared(folder, storage, dies):
    """One of two workers, which may die by kill -9 in its second training run."""
    evaluate, begun = Runner._evaluate, []

    def begin(runner, *what):
        begun.append(what)
        if dies and len(begun) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(runner, *what)

    with mock.patch.multiple(Runner, _evaluate=begin, _warm_up=meet):
        run(folder, told=print, storage=storage, **SHORT).save(folder / f"results-{os.getpid()}.json")


def outlive(runner):
    """Kill the other worker in its first training run."""
    storage, study = runner._storage, runner._storage.get_study_id_from_name("compare")
    for _ in range(3000):
        running = storage.get_all_trials(study, deepcopy=False, states=[TrialState.RUNNING])
        others = {int(trial.user_attrs["worker"].rpartition(":")[2]) for trial in running} - {os.getpid()}
        for process in others:
            os.kill(process, signal.SIGKILL)
        if others:
            return
        time.sleep(0.1)


def meet(runner):
    """Wait for the other worker, so that both have something to do."""
    (runner.folder / f"here-{process_name()}").touch()
    for _ in range(600):
        if len(list(runner.folder.glob("here-*"))) > 1:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        with even(), mock.patch.object(Runner, "_warm_up", outlive if "--workers" in sys.argv else meet):
            sys.exit(main(["compare", *sys.argv[1:]]))
    if sys.argv[2] in ("dies", "lives"):
        shared(Path(sys.argv[1]), sys.argv[3], sys.argv[2] == "dies")
    else:
        killed_after(Path(sys.argv[1]), int(sys.argv[2]))
