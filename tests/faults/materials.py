"""Small models, images and texts for the commands, and finished runs to damage."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_ft.testing.models import tiny_bert, tiny_mobilenet_v2, tiny_resnet
from tests.faults.processes import run

NAMES = ("cat", "dog")
QUIET = ("--use_cpu", "true", "--disable_tqdm", "true")


class Materials:
    """Files in a folder, created when they are first needed.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- models and data -----------------------------------------------------------------------------------

    @cached_property
    def photos(self) -> Path:
        """Sixteen images for training, eight for validation and eight for the test, in two classes."""
        random, root = np.random.default_rng(0), self.folder / "photos"
        for split, number in (("train", 8), ("validation", 4), ("test", 4)):
            for index, name in enumerate(NAMES):
                (root / split / name).mkdir(parents=True)
                for image in range(number):
                    pixels = random.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(60 * index)
                    Image.fromarray(pixels).save(root / split / name / f"{image}.png")
        return root

    @cached_property
    def resnet(self) -> Path:
        """A ResNet whose pretrained head has the classes of the images, and one more."""
        names = dict(enumerate(("owl", *NAMES)))
        model = tiny_resnet(id2label=names, label2id={name: index for index, name in names.items()})
        return self._saved(model, "resnet")

    @cached_property
    def mobilenet(self) -> Path:
        return self._saved(tiny_mobilenet_v2(), "mobilenet")

    def _saved(self, model, name: str) -> Path:
        model.save_pretrained(self.folder / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(self.folder / name)
        return self.folder / name

    @cached_property
    def reviews(self) -> Path:
        rows = [f"{word} film {i},{word},{i / 10}" for i in range(12) for word in ("good", "bad")]
        file = self.folder / "reviews.csv"
        file.write_text("\n".join(["text,label,score", *rows]) + "\n", encoding="utf-8")
        return file

    @cached_property
    def bert(self) -> Path:
        folder = self.folder / "bert"
        tiny_bert(num_labels=2).save_pretrained(folder)
        words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
        raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
        return folder

    # --- commands ------------------------------------------------------------------------------------------

    def train(self, *more: str, steps: int = 1) -> list[str]:
        """A command that trains on the images."""
        where = ["--model", str(self.resnet), "--dataset", str(self.photos), "--output_dir", "out"]
        return ["train", *where, *QUIET, "--max_steps", str(steps), "--per_device_train_batch_size", "4", *more]

    def train_texts(self, data: str, *more: str) -> list[str]:
        where = ["--model", str(self.bert), "--dataset", data, "--output_dir", "out"]
        return ["train", *where, *QUIET, "--max_steps", "1", *more]

    def compare(self, *more: str) -> list[str]:
        """A command that compares, with one trial and one seed."""
        where = ["--model", str(self.resnet), "--dataset", str(self.photos), "--output_dir", "out"]
        few = [
            "--trials",
            "1",
            "--seeds",
            "1",
            "--num_train_epochs",
            "1",
            "--strategies",
            "linear_probe",
            "--folds",
            "1",
        ]
        return ["compare", *where, "--use_cpu", "true", *few, "--per_device_train_batch_size", "8", *more]

    def search(self, *more: str) -> list[str]:
        """A command that searches for a block."""
        where = ["--model", str(self.resnet), "--dataset", str(self.photos), "--output_dir", "out"]
        return ["search-blocks", *where, *QUIET, "--search_epochs", "1", *more]

    def train_together(self, *more: str, steps: int = 1) -> list[str]:
        """A command that trains two models together."""
        models = ["--strategy", "amcf", "--amcf.source_models", f"{self.resnet},{self.mobilenet}"]
        where = ["--dataset", str(self.photos), "--output_dir", "out", *QUIET]
        return ["train", *models, *where, "--max_steps", str(steps), "--per_device_train_batch_size", "4", *more]

    # --- finished runs -------------------------------------------------------------------------------------

    @cached_property
    def trained(self) -> Path:
        """A folder whose ``out`` holds a finished run with two checkpoints, of strategies with states and modules."""
        strategies = ["--strategy", "lp_ft", "--strategy", "tred"]
        saving = ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no", "--save_total_limit", "2"]
        return self._done("trained", self.train(*strategies, *saving, steps=4))

    @cached_property
    def compared(self) -> Path:
        return self._done("compared", self.compare())

    @cached_property
    def searched(self) -> Path:
        """A folder whose ``out`` holds a finished search in an SQLite file."""
        return self._done("searched", self.search())

    @cached_property
    def journal(self) -> Path:
        """As ``searched``, in a journal."""
        return self._done("journal", self.search("--storage", "out/study.log"))

    def _done(self, name: str, command: Sequence[str]) -> Path:
        folder = self.folder / name
        (folder / "out").mkdir(parents=True)
        ended = run(command, folder)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {ended.code}:\n{ended.err[-2000:]}")
        return folder


def copied(folder: Path, to: Path) -> None:
    """Copy the files of a finished run in ``out``."""
    shutil.copytree(folder / "out", to / "out")
