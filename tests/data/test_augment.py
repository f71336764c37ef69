"""The policies: their operations against Pillow's, what they draw, and that draws do not depend on the process."""

import collections
import itertools
import random
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageEnhance, ImageOps
from transformers import TrainerCallback, ViTImageProcessorPil

from hf_ft import FTTrainer
from hf_ft.data import AUGMENTATIONS, ROW, augment, collate, find_columns, prepare
from hf_ft.data.augment import OPERATIONS, POLICIES, STANDARD, WIDE
from hf_ft.data.in_memory import held
from hf_ft.errors import DataError
from hf_ft.models.preserve import random_states
from hf_ft.testing import tiny_resnet
from hf_ft.testing.training import tiny_arguments
from hf_ft.trainer.training_batches import TrainingBatches

SIDE = 32


def photo(seed=0, size=(53, 37)):
    noise = np.random.default_rng(seed).normal(120, 50, (size[1], size[0], 3))
    return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))


def affine(image, *numbers):
    return image.transform(image.size, Image.Transform.AFFINE, numbers, fillcolor=(128, 128, 128))


# The papers' experiments used Pillow; strengths are on the papers' scale.
PILLOW = {
    "auto_contrast": (0, ImageOps.autocontrast),
    "equalize": (0, ImageOps.equalize),
    "invert": (0, ImageOps.invert),
    "posterize": (5.6, lambda image: ImageOps.posterize(image, 5)),
    "solarize": (0.7, lambda image: ImageOps.solarize(image, 0.7 * 255)),
    "solarize nothing": (1.0, lambda image: image),
    "color": (1.72, lambda image: ImageEnhance.Color(image).enhance(1.72)),
    "contrast": (0.28, lambda image: ImageEnhance.Contrast(image).enhance(0.28)),
    "brightness": (1.72, lambda image: ImageEnhance.Brightness(image).enhance(1.72)),
    "sharpness": (0.28, lambda image: ImageEnhance.Sharpness(image).enhance(0.28)),
    "shear_x": (0.27, lambda image: affine(image, 1, 0.27, 0, 0, 1, 0)),
    "shear_y": (-0.99, lambda image: affine(image, 1, 0, 0, -0.99, 1, 0)),
    "translate_x": (0.2, lambda image: affine(image, 1, 0, -round(0.2 * 53), 0, 1, 0)),
    "translate_y": (-0.2, lambda image: affine(image, 1, 0, 0, 0, 1, round(0.2 * 37))),
    "rotate": (27.0, lambda image: image.rotate(27, fillcolor=(128, 128, 128))),
}


@pytest.mark.parametrize("name", PILLOW)
def test_operations_are_those_of_pillow(name):
    value, pillow = PILLOW[name]
    image = photo()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    found = OPERATIONS[name.split()[0]](pixels, value, 128 / 255)[0].permute(1, 2, 0) * 255
    gap = (found.round() - torch.from_numpy(np.array(pillow(image))).float()).abs()
    if name == "rotate":  # a pixel between two may be taken from either
        assert (gap > 1).float().mean() < 0.02
    else:
        assert gap.max() <= 1


def test_an_even_image_keeps_its_colour():
    even = torch.full((1, 3, 8, 8), 0.6)
    assert torch.equal(OPERATIONS["auto_contrast"](even, 0, 0.0), even)


def test_strengths_span_the_ranges_of_the_papers():
    def ends(strengths, name):
        random.seed(0)
        values = [strengths[name].at(level) for level in (0.0, 1.0) for _ in range(20)]
        return min(values), max(values)

    assert len(WIDE) == len(STANDARD) == 14
    expected = {"rotate": (-135, 135), "shear_x": (-0.99, 0.99), "translate_y": (-32 / 224, 32 / 224)}
    expected |= {"color": (0.01, 2.0), "sharpness": (0.01, 2.0), "posterize": (2, 8), "solarize": (0, 1)}
    assert all(ends(WIDE, name) == pytest.approx(wanted) for name, wanted in expected.items())
    expected = {"rotate": (-30, 30), "shear_y": (-0.3, 0.3), "translate_x": (-100 / 224, 100 / 224)}
    expected |= {"contrast": (0.1, 1.9), "posterize": (4, 8), "solarize": (0, 1)}
    assert all(ends(STANDARD, name) == pytest.approx(wanted) for name, wanted in expected.items())


def test_what_the_policies_draw():
    random.seed(0)
    trivial = [POLICIES["trivial"].steps() for _ in range(3000)]
    assert all(len(steps) == 1 and steps[0][1] == 1.0 for steps in trivial)
    counts = collections.Counter(steps[0][0] for steps in trivial)
    assert set(counts) == set(WIDE) and min(counts.values()) > 150
    assert sorted({round(30 * steps[0][2]) for steps in trivial}) == list(range(31))
    rand = [POLICIES["rand"].steps() for _ in range(3000)]
    assert all([step[1:] for step in steps] == [(1.0, 0.9)] * 2 for steps in rand)
    assert {steps[1][0] for steps in rand} == set(STANDARD)
    assert 150 < sum(steps[0][0] == steps[1][0] for steps in rand) < 280  # drawn with replacement: one in 14
    auto = {tuple(POLICIES["auto"].steps()) for _ in range(1000)}
    # From the table in the paper's appendix; five of its 25 pairs appear twice.
    assert len(auto) == 20 and all(len(pair) == 2 for pair in auto)
    assert (("posterize", 0.4, 0.8), ("rotate", 0.6, 0.9)) in auto
    assert (("sharpness", 0.4, 0.7), ("invert", 0.6, 0.0)) in auto
    assert (("color", 0.6, 0.4), ("contrast", 1.0, 0.8)) in auto


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_keeps_size_and_mode_and_leaves_the_image(name):
    image, before, seen = photo(), photo().tobytes(), set()
    for seed in range(60):
        random.seed(seed)
        changed = POLICIES[name](image)
        assert changed.size == image.size and changed.mode == "RGB"
        seen.add(changed.tobytes())
    assert image.tobytes() == before and len(seen) > 20


# --- draws --------------------------------------------------------------------------------------------------


def prepared(kind, numbered=True, rows=10):
    features = Features(image=ImageFeature(), label=ClassLabel(names=["a", "b"]))
    images = [np.array(photo(seed, (40, 48))) for seed in range(rows)]
    data = Dataset.from_dict({"image": images, "label": [0, 1] * (rows // 2)}, features=features)
    data = data.add_column(ROW, range(rows)) if numbered else data
    splits = DatasetDict({"train": data})
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return prepare(splits, processor, find_columns(splits), kind)["train"], collate(processor)


def read(kind, batches, epoch=0, seed=3, workers=0, numbered=True):
    """The pixels of each row, from training batches with these rows."""
    data, stack = prepared(kind, numbered)
    loader = torch.utils.data.DataLoader(
        range(len(data)),
        batch_sampler=batches,
        collate_fn=TrainingBatches(data, stack, seed, torch.tensor(epoch)),
        num_workers=workers,
    )
    pixels = [batch["pixel_values"] for batch in loader]
    return dict(zip(itertools.chain(*batches), torch.cat(pixels), strict=True))


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("kind", ["basic", *POLICIES])
def test_what_is_drawn_for_an_image_depends_on_seed_epoch_and_image_alone(kind, numbered):
    first = read(kind, [[0, 1, 2, 3], [4, 5, 6, 7]], numbered=numbered)
    other = read(kind, [[7, 2], [5, 0, 9, 1, 4], [3, 6]], numbered=numbered)
    assert all(torch.equal(pixels, other[row]) for row, pixels in first.items())
    plain = read("none", [list(first)], numbered=numbered)
    assert sum(torch.equal(pixels, plain[row]) for row, pixels in first.items()) <= 4
    for more in ({"epoch": 1}, {"seed": 4}):
        again = read(kind, [list(first)], numbered=numbered, **more)
        assert sum(torch.equal(pixels, again[row]) for row, pixels in first.items()) <= 4


def test_worker_processes_draw_the_same():
    rows = [[3, 1, 4], [5, 9, 2], [6, 8]]
    alone, shared = read("trivial", rows), read("trivial", rows, workers=2)
    assert all(torch.equal(pixels, shared[row]) for row, pixels in alone.items())


def test_it_leaves_the_random_states_but_differs_at_each_read_elsewhere():
    data, stack = prepared("rand")
    states = random_states()
    TrainingBatches(data, stack, 3, torch.tensor(0))([0, 1])
    assert random_states() == states
    with pytest.raises(ValueError, match="differ each time they are read"):  # which the frozen cache also detects
        held(data)
    random.seed(1)
    one = data[:4]["pixel_values"]
    random.seed(1)
    assert all(map(torch.equal, one, data[:4]["pixel_values"]))


@pytest.mark.parametrize("kind", POLICIES)
def test_without_kornia_the_error_says_what_to_install(kind, monkeypatch):
    augment._kornia.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-ft\[augment\]'"):
        prepared(kind)
    prepared("basic")


def test_text_and_sounds_have_no_augmentation():
    rows = DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})})
    for kind in set(AUGMENTATIONS) - {"none"}:
        with pytest.raises(DataError, match=f"augment='{kind}' changes images, but these data are text: use none"):
            prepare(rows, None, find_columns(rows), kind)


def test_large_images_are_shrunk_to_the_size_that_the_model_sees():
    assert augment.shrunk(photo(size=(640, 320)), 224).size == (448, 224)
    small = photo()
    assert augment.shrunk(small, 224) is small and augment.shrunk(small, None) is small


@pytest.mark.slow
def test_a_frozen_part_is_computed_in_every_step_and_a_log_line_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "hf_ft.trainer.stage_cache")
    said = []
    for kind in ("trivial", "none"):
        data, stack = prepared(kind)
        args = tiny_arguments(tmp_path, max_steps=6, per_device_train_batch_size=5, remove_unused_columns=False)
        model = tiny_resnet(num_labels=2)
        trainer = FTTrainer(model, args, strategy="linear_probe", train_dataset=data, data_collator=stack)
        recorded = []
        trainer.add_callback(Recorded(trainer, recorded))
        trainer.train()
        said.append([record.getMessage() for record in caplog.records])
        assert recorded == [kind == "none"] * 6
    assert said[0] == ["Training samples differ each time they are read: the frozen part is computed in every step."]
    assert said[1] == said[0]


class Recorded(TrainerCallback):
    def __init__(self, trainer, seen):
        self.trainer, self.seen = trainer, seen

    def on_step_end(self, *args, **kwargs):
        self.seen.append(self.trainer._attempt.objective.prefix is not None)
