"""Images of every kind are opened as they look; those that cannot be opened are found, refused or left out."""

import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MobileNetV2ImageProcessorPil

from hf_ft.data import images
from hf_ft.data.columns import find_columns
from hf_ft.data.images import Unreadable, check_images, open_rgb
from hf_ft.data.load import load_splits
from hf_ft.data.prepare import collate, prepare

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]


@pytest.fixture(autouse=True)
def offline_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def with_alpha(pixels):
    return np.concatenate([pixels, RNG.integers(0, 256, (*pixels.shape[:2], 1), dtype=np.uint8)], axis=2)


def stacked(grey):
    return np.stack([grey] * 3, axis=2)


def few_colours():
    image = Image.fromarray(RGB // 128 * 255).quantize(8)
    return image, np.asarray(image.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(image)]


def kinds():
    """Each kind of image: file name, image, options for saving, and its pixels in RGB."""
    palette, colours = few_colours()
    deep = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    cmyk = np.concatenate([255 - RGB, np.zeros((6, 9, 1), dtype=np.uint8)], axis=2)
    bits = GREY > 127
    return {
        "grey": ("a.png", Image.fromarray(GREY), {}, stacked(GREY)),
        "one bit": ("a.png", Image.fromarray(bits), {}, stacked(bits * np.uint8(255))),
        "palette": ("a.png", palette, {}, colours),
        "palette with transparency": ("a.png", palette, {"transparency": b"\0\x80\xff"}, colours),
        "rgba": ("a.png", Image.fromarray(with_alpha(RGB)), {}, RGB),
        "grey with alpha": ("a.png", Image.fromarray(with_alpha(GREY[..., None])), {}, stacked(GREY)),
        "cmyk": ("a.tif", Image.fromarray(cmyk, mode="CMYK"), {}, RGB),
        "16 bits": ("a.png", Image.fromarray(deep), {}, stacked((deep // 256).astype(np.uint8))),
        "16 bits, tif": ("a.tif", Image.fromarray(deep), {}, stacked((deep // 256).astype(np.uint8))),
        "32 bits, small values": ("a.tif", Image.fromarray(GREY.astype(np.int32)), {}, stacked(GREY)),
        "1x1": ("a.png", Image.fromarray(RGB[:1, :1]), {}, RGB[:1, :1]),
        "one row": ("a.png", Image.fromarray(RGB[:1]), {}, RGB[:1]),
        "three rows": ("a.png", Image.fromarray(RGB[:3]), {}, RGB[:3]),
        "one column, grey": ("a.png", Image.fromarray(GREY[:, :1]), {}, stacked(GREY[:, :1])),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", kinds())
def test_kinds_of_images_open_as_they_look(tmp_path, kind):
    name, image, options, pixels = kinds()[kind]
    image.save(tmp_path / name, **options)
    assert Image.open(tmp_path / name).size == image.size
    opened = open_rgb(str(tmp_path / name), 0)
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), pixels)
    given = {"path": None, "bytes": (tmp_path / name).read_bytes()}
    np.testing.assert_array_equal(np.asarray(open_rgb(given, 0)), pixels)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x"]))
    rows = {"image": [str(tmp_path / name)] * 2, "label": [0, 0]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))
    height, width = pixels.shape[:2]
    same_size = MobileNetV2ImageProcessorPil(size={"height": height, "width": width}, do_center_crop=False)
    columns = find_columns(splits)
    assert check_images(splits, columns) == (splits, {"train": []})
    batch = collate(same_size)(prepare(splits, same_size, columns)["train"].__getitems__([0, 1]))
    wanted = (pixels.astype(np.float64) / 255 - same_size.image_mean) / same_size.image_std
    assert batch["pixel_values"].shape == (2, 3, height, width)
    np.testing.assert_allclose(batch["pixel_values"][1].permute(1, 2, 0), wanted, atol=1e-5)
    augmented = prepare(splits, same_size, columns, augment="basic")["train"][0]["pixel_values"]
    assert augmented.shape == (3, height, width) and bool(torch.isfinite(augmented).all())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(tmp_path, orientation):
    # From the specification: where row 0 and column 0 of the stored pixels belong in the picture.
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_rgb(str(tmp_path / "a.png"), 0)), turned[orientation])


@pytest.mark.parametrize("pixels", [np.array([[0, 70000]], np.int32), np.array([[0, 1.0]], np.float32)])
def test_32_bits_of_unknown_range_are_refused_instead_of_white_or_black(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"row 4 \(.*a\.tif\): its 32-bit pixels range from 0 to (70000|1): convert"):
        open_rgb(str(tmp_path / "a.tif"), 4)


# Unreadable images


def photo(path, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path


def folder_with_damage(folder):
    """Ten images of two classes and, in the second, three files that are not images."""
    for name, count in (("cat", 5), ("dog", 5)):
        for number in range(count):
            photo(folder / name / f"{number}.jpg")
    whole = photo(folder / "dog" / "truncated.jpg", (200, 200))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    (folder / "dog" / "text.jpg").write_text("<html>404</html>")
    return folder


def flat(skipped):
    return [image for images in skipped.values() for image in images]


def test_damaged_files_are_refused_by_number_row_and_path(tmp_path):
    splits = load_splits(str(folder_with_damage(tmp_path / "pets")))
    with pytest.raises(ValueError) as caught:
        check_images(splits, find_columns(splits))
    message = str(caught.value)
    assert message.startswith("3 of 13 images cannot be read: ") and "on_corrupt='skip'" in message
    for name, reason in (("truncated", "truncated"), ("empty", "not an image, or"), ("text", "not an image, or")):
        assert re.search(rf"(train|validation), row 1\d \(.*dog/{name}\.jpg\): .*{reason}", message)


def test_damaged_files_are_skipped_reported_and_returned(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images.logger, "propagate", True)
    splits = load_splits(str(folder_with_damage(tmp_path / "pets")))
    columns = find_columns(splits)
    kept, skipped = check_images(splits, columns, "skip")
    assert "3 of 13 images cannot be read: " in caplog.text and "They are skipped." in caplog.text
    assert list(kept) == list(splits) == list(skipped)
    assert {name: len(split) for name, split in kept.items()} == {
        name: len(split) - len(skipped[name]) for name, split in splits.items()
    }
    assert sorted((image.row, image.path.rsplit("/", 1)[1]) for image in flat(skipped)) == [
        (10, "empty.jpg"),
        (11, "text.jpg"),
        (12, "truncated.jpg"),
    ]
    assert skipped == check_images(splits, columns, "skip")[1]
    processor = MobileNetV2ImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    for split in prepare(kept, processor, columns).values():
        assert all(row["pixel_values"].shape == (3, 16, 16) for row in split)
    assert check_images(kept, columns)[1] == {name: [] for name in kept}


def test_missing_files_and_cells_of_a_table(tmp_path):
    photo(tmp_path / "images" / "1.png")
    rows = ["gone.png,cat", "images/1.png,dog", ",cat", *["images/1.png,cat", "images/1.png,dog"] * 4]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    splits = load_splits(str(tmp_path / "table.csv"))
    columns = find_columns(splits)
    assert columns.inputs == ("image",) and columns.task == "image"
    skipped = flat(check_images(splits, columns, "skip")[1])
    assert sorted((image.row, image.path, image.reason) for image in skipped) == [
        (0, str(tmp_path / "gone.png"), "no such file"),
        (2, None, "there is no image"),
    ]


def test_bytes_without_a_path():
    good = photo_bytes()
    rows = {"image": [{"bytes": good, "path": None}, {"bytes": good[:50], "path": None}], "label": [0, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x"]))
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))
    [wrong] = check_images(splits, find_columns(splits), "skip")[1]["train"]
    assert (wrong.row, wrong.path) == (1, None) and " at 0x" not in wrong.reason and "no path" in str(wrong)


def photo_bytes():
    from io import BytesIO

    buffer = BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    return buffer.getvalue()


def test_many_images_are_checked_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 7)
    path = str(photo(tmp_path / "1.png"))
    bad = {3, 6, 7, 20, 29}
    rows = {"image": [str(tmp_path / "no.png") if row in bad else path for row in range(30)], "label": [0, 1] * 15}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    columns = find_columns(splits)
    kept, skipped = check_images(splits, columns, "skip")
    assert [image.row for image in skipped["train"]] == sorted(bad) and len(kept["train"]) == 25
    with pytest.raises(ValueError, match="row 3 .*row 6 .*row 7 .*; and 2 more"):
        check_images(splits, columns)


def test_a_class_and_a_split_without_images_are_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images.logger, "propagate", True)
    path, none = str(photo(tmp_path / "1.png")), str(tmp_path / "no.png")
    good = datasets.Dataset.from_dict({"image": [path, none, path], "label": ["a", "b", "c"]})
    splits = datasets.DatasetDict(train=good, validation=good.select([0, 2]))
    check_images(splits, find_columns(splits), "skip")
    assert "too few rows of some classes: train has none of 'b' (1 row)" in caplog.text
    splits["validation"] = good.select([1])
    with pytest.raises(ValueError, match="2 of 4 images cannot be read.*Split 'validation' has no images left"):
        check_images(splits, find_columns(splits), "skip")


def test_text_is_left_alone_and_unknown_options_are_named():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))
    columns = find_columns(splits)
    assert check_images(splits, columns) == (splits, {"train": []})
    with pytest.raises(ValueError, match="on_corrupt='drop' is unknown: choose refuse or skip"):
        check_images(splits, columns, "drop")
    assert str(Unreadable(3, None, "gone")) == "row 3 (no path): gone"
