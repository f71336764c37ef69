"""Several processors as one: every tensor is that of its part, files restore it, and errors name the cause."""

import copy
import json
import random

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from transformers.utils import is_torchvision_available

from hf_ft.data.augment import augmented, flip_and_shift
from hf_ft.data.columns import find_columns
from hf_ft.data.prepare import collate, prepare
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import CollaborativeImageProcessor, column, combined, distinct
from hf_ft.testing.models import tiny_resnet
from tests.forked import python
from tests.models.ensemble.hub_uploads import uploads

pil = pytest.mark.skipif(
    getattr(hf.MobileNetV2ImageProcessorPil, "is_dummy", False),
    reason="this version of Transformers has no image processors without torchvision",
)
alone = pytest.mark.skipif(is_torchvision_available(), reason="with torchvision, files give back another class")
RNG = np.random.default_rng(0)
PHOTOS = [PIL.Image.fromarray(RNG.integers(0, 255, (40, 30 + n, 3), dtype=np.uint8)) for n in range(3)]


def mobilenet(side=16, **more):
    return hf.MobileNetV2ImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, **more)


def efficientnet(side=24):
    return hf.EfficientNetImageProcessorPil(size={"height": side, "width": side}, include_top=False)


def vit(side=16):
    return hf.ViTImageProcessorPil(size={"height": side, "width": side})


def pixels(processor, images=PHOTOS):
    return processor(images=images, return_tensors="pt")


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def run(code, *arguments):
    ran = python("-c", code, *arguments)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_columns():
    assert [column("pixel_values", index) for index in (0, 1, 12)] == [
        "pixel_values",
        "pixel_values_1",
        "pixel_values_12",
    ]


# --- image processors --------------------------------------------------------------------------------------


@pil
@alone
def test_distinct_by_class_and_settings_wherever_they_come_from(tmp_path):
    first, second = mobilenet(), efficientnet()
    first.save_pretrained(tmp_path)
    reread = hf.AutoImageProcessor.from_pretrained(tmp_path)
    reread.name_or_path = str(tmp_path)
    given = [first, second, reread, mobilenet(20), vit(), efficientnet()]
    parts, inputs = distinct(given)
    assert inputs == [0, 1, 0, 2, 3, 1]
    assert all(part is given[index] for part, index in zip(parts, (0, 1, 3, 4), strict=True))
    assert distinct([first, mobilenet(image_mean=[0.1, 0.2, 0.3])])[1] == [0, 1]
    assert combined([first, reread]) is first


@pil
def test_each_tensor_is_that_of_its_part(tmp_path):
    parts = [mobilenet(), efficientnet(), hf.ConvNextImageProcessorPil(size={"shortest_edge": 20})]
    both = combined([parts[0], *parts])
    assert isinstance(both, CollaborativeImageProcessor)
    assert both.model_input_names == ["pixel_values", "pixel_values_1", "pixel_values_2"]
    PHOTOS[0].save(tmp_path / "photo.png")
    for images in (PHOTOS, PHOTOS[0], [np.asarray(PHOTOS[1])], str(tmp_path / "photo.png")):
        wanted = [pixels(part, images)["pixel_values"] for part in parts]
        assert_same(pixels(both, images), {column("pixel_values", i): tensor for i, tensor in enumerate(wanted)})
    plain = both(PHOTOS, return_tensors="pt", do_normalize=False)
    assert torch.equal(plain["pixel_values_1"], parts[1](PHOTOS, return_tensors="pt", do_normalize=False).pixel_values)


@pil
def test_grey_images_are_processed_by_each_part():
    grey = [photo.convert("L") for photo in PHOTOS]
    parts = [mobilenet(do_convert_rgb=True), vit()]
    parts[1].do_convert_rgb = True
    assert_same(
        pixels(combined(parts), grey),
        {"pixel_values": pixels(parts[0], grey).pixel_values, "pixel_values_1": pixels(parts[1], grey).pixel_values},
    )


@pil
def test_images_are_opened_once_and_processed_once_per_distinct_processor(tmp_path, monkeypatch):
    calls = []

    def counted(name, function):
        return lambda *arguments, **options: calls.append(name) or function(*arguments, **options)

    for kind in (hf.MobileNetV2ImageProcessorPil, hf.EfficientNetImageProcessorPil):
        monkeypatch.setattr(kind, "preprocess", counted(kind.__name__, kind.preprocess))
    monkeypatch.setattr(PIL.Image, "open", counted("open", PIL.Image.open))
    PHOTOS[0].save(tmp_path / "photo.png")
    both = combined([mobilenet(), efficientnet(), mobilenet(), efficientnet()])
    pixels(both, str(tmp_path / "photo.png"))
    assert calls == ["open", "MobileNetV2ImageProcessorPil", "EfficientNetImageProcessorPil"]


@pil
@alone
def test_files_restore_it(tmp_path):
    both = combined([mobilenet(), efficientnet(), vit()])
    both.save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert file.name == "preprocessor_config.json"
    assert content["image_processor_type"] == "CollaborativeImageProcessor"
    assert [part["image_processor_type"] for part in content["processors"]] == [
        "MobileNetV2ImageProcessor",
        "EfficientNetImageProcessor",
        "ViTImageProcessor",
    ]
    for kind in (hf.AutoImageProcessor, CollaborativeImageProcessor):
        back = kind.from_pretrained(tmp_path)
        assert type(back) is CollaborativeImageProcessor and back.to_dict() == both.to_dict()
        assert distinct([*both.processors, *back.processors])[1] == [0, 1, 2] * 2
        assert_same(pixels(back), pixels(both))
    smaller = hf.AutoImageProcessor.from_pretrained(tmp_path, size={"height": 8, "width": 8})
    assert {tensor.shape[-2:] for tensor in pixels(smaller).values()} == {(8, 8)}
    assert_same(pixels(copy.deepcopy(both)), pixels(both))


@pil
def test_pushed_as_any_image_processor(monkeypatch):
    files = uploads(monkeypatch)
    combined([mobilenet(), efficientnet()]).push_to_hub("someone/cells")
    assert files == ["README.md", "preprocessor_config.json"]


@pytest.mark.slow
@pil
def test_a_process_that_only_imports_the_package_reads_it_and_a_pipeline_scores_alike(tmp_path):
    processors = [mobilenet(32), efficientnet(40)]
    model = CollaborativeModel.from_members([tiny_resnet(), tiny_resnet(seed=1)], inputs=[0, 1])
    both = combined(processors)
    both.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    paths = [tmp_path / f"photo_{number}.png" for number in range(len(PHOTOS))]
    for photo, path in zip(PHOTOS, paths, strict=True):
        photo.save(path)
    with torch.no_grad():
        wanted = model(**pixels(both)).logits.softmax(-1)
    code = """
import importlib, json, sys
import hf_ft
importlib.reload(importlib.import_module("hf_ft.models.ensemble.processor"))  # registers again
from transformers import AutoImageProcessor, pipeline
folder, *photos = sys.argv[1:]
classify = pipeline("image-classification", model=folder)
assert type(AutoImageProcessor.from_pretrained(folder)).__name__ == "CollaborativeImageProcessor"
print(json.dumps([[classify(photos[0])], classify(photos), classify(photos, batch_size=2)]))
"""
    for answers in run(code, tmp_path / "model", *paths):
        for answer, scores in zip(answers, wanted, strict=False):
            found = {entry["label"]: entry["score"] for entry in answer}
            ordered = [found[model.config.id2label[label]] for label in range(len(scores))]
            assert ordered == pytest.approx(scores.tolist(), abs=1e-6)


@pil
@alone
def test_no_code_from_files_is_run(tmp_path):
    combined([mobilenet(), efficientnet()]).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    content = json.loads(file.read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    content["processors"][1]["auto_map"] = {"AutoImageProcessor": "evil.Evil"}
    file.write_text(json.dumps(content))
    assert type(hf.AutoImageProcessor.from_pretrained(tmp_path).processors[1]) is hf.EfficientNetImageProcessorPil
    content["processors"][1]["image_processor_type"] = "EvilImageProcessor"
    file.write_text(json.dumps(content))
    with pytest.raises(OptionError, match=r"processors\[1\] is a 'EvilImageProcessor', which cannot be created"):
        hf.AutoImageProcessor.from_pretrained(tmp_path)


@pil
@pytest.mark.parametrize("name", ["BertModel", "pipeline", "CollaborativeImageProcessor", "ViT"])
def test_a_class_that_is_not_an_image_processor_is_named(name):
    with pytest.raises(OptionError, match=rf"processors\[1\] is a '{name}'"):
        CollaborativeImageProcessor([mobilenet(), {"image_processor_type": name}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"processors": [', r"cannot be read \(.*not a valid JSON"),
        ('{"image_processor_type": "CollaborativeImageProcessor"}', "'processors' contains None"),
        ('{"processors": []}', r"'processors' contains \[\]"),
        (
            '{"processors": [{"size": 3}]}',
            r"'processors' contains \{'size': 3\}, not settings with .*image_processor_type",
        ),
        ('{"processors": "ViT"}', "'processors' contains 'ViT'"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json.*{message}.*[Rr]estore it"):
        CollaborativeImageProcessor.from_pretrained(tmp_path)


@pil
def test_image_processors_and_tokenizers_do_not_mix():
    words = hf.BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1})
    with pytest.raises(OptionError, match="MobileNetV2ImageProcessorPil, BertTokenizer.*are mixed"):
        combined([mobilenet(), words])
    with pytest.raises(OptionError, match=r"processors\[1\] is a BertTokenizer"):
        CollaborativeImageProcessor([mobilenet(), words])


# --- prepared images -----------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    return datasets.Dataset.from_dict({"image": PHOTOS, "label": [2, 0, 1]}, features=features)


@pil
@pytest.mark.parametrize("sides", [(16, 16), (16, 24)])
def test_prepared_rows_are_each_parts_output_for_the_photos(rows, sides):
    both = combined([mobilenet(sides[0]), efficientnet(sides[1])])
    items = prepare(datasets.DatasetDict({"train": rows}), both, find_columns(rows))["train"].__getitems__([0, 2])
    assert [item["labels"] for item in items] == [2, 1]
    batch = collate(both)(items)
    assert_same({name: batch[name] for name in both.model_input_names}, pixels(both, [PHOTOS[0], PHOTOS[2]]))
    assert all(batch[name].is_contiguous(memory_format=torch.channels_last) for name in both.model_input_names)


@pil
@pytest.mark.parametrize("sides", [(16, 16), (16, 24)])
def test_prepared_rows_are_augmented_alike_for_all_parts(rows, sides):
    parts = [mobilenet(sides[0]), efficientnet(sides[1])]
    ready = prepare(datasets.DatasetDict({"train": rows}), combined(parts), find_columns(rows), augment="basic")[
        "train"
    ]
    random.seed(1)
    items, after = ready.__getitems__([0, 1, 2]), random.getstate()
    for index, part in enumerate(parts):
        random.seed(1)
        wanted = pixels(part, augmented(PHOTOS, flip_and_shift, None))["pixel_values"]
        assert torch.equal(torch.stack([item[column("pixel_values", index)] for item in items]), wanted)
        assert random.getstate() == after
