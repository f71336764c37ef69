"""Large images: JPEGs are decoded at a reduced size, in threads, with a progress bar."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ConvNextImageProcessorPil, MobileNetV2ImageProcessorPil

from hf_ft.data import images, progress
from hf_ft.data.columns import find_columns
from hf_ft.data.images import check_images, open_rgb
from hf_ft.data.in_memory import held
from hf_ft.data.prepare import prepare
from hf_ft.models.ensemble.processor import combined

RNG = np.random.default_rng(0)


def photo(width, height):
    """Smooth colours with sharp edges."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    pixels = np.stack([128 + 90 * np.sin(9 * x + 4 * y), 255 * ((20 * x).astype(int) % 2), 200 * y], axis=2)
    return Image.fromarray(np.clip(pixels + RNG.integers(-9, 9, pixels.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    file = tmp_path_factory.mktemp("large") / "a.jpg"
    photo(1200, 900).save(file, quality=95)
    assert file.stat().st_size > images.LARGE
    return file


@pytest.mark.parametrize(
    ("side", "size"), [(None, (1200, 900)), (181, (1200, 900)), (180, (600, 450)), (90, (300, 225)), (8, (150, 113))]
)
def test_a_large_jpeg_is_decoded_at_no_less_than_twice_the_size_needed(large, side, size):
    opened = open_rgb(str(large), 0, side)
    assert opened.size == size and opened.mode == "RGB"
    assert side is None or opened.size == (1200, 900) or min(opened.size) >= images.KEPT * side
    assert open_rgb({"path": None, "bytes": large.read_bytes()}, 0, side).size == size


def test_resized_it_looks_as_if_fully_decoded(large):
    whole, reduced = (np.asarray(open_rgb(str(large), 0, side).resize((64, 64))).astype(int) for side in (None, 64))
    assert np.abs(whole - reduced).mean() < 0.6 and np.abs(whole - reduced).max() <= 8


def test_small_images_and_other_formats_are_decoded_whole(tmp_path):
    """Bit for bit, whatever the size."""
    for name, size in (("small.jpg", (300, 200)), ("large.png", (500, 400)), ("narrow.jpg", (40, 9000))):
        photo(*size).save(tmp_path / name, **({"quality": 95} if name.endswith("jpg") else {}))
        opened = open_rgb(str(tmp_path / name), 0, 32)
        assert np.array_equal(opened, open_rgb(str(tmp_path / name), 0)) and opened.size == size


def test_a_large_jpeg_is_rotated_and_a_truncated_one_found(large, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(large).save(tmp_path / "turned.jpg", quality=95, exif=turned)
    assert open_rgb(str(tmp_path / "turned.jpg"), 0, 90).size == (225, 300)
    for share in (0.5, 0.95):
        content = large.read_bytes()
        (tmp_path / "cut.jpg").write_bytes(content[: int(share * len(content))])
        assert "truncated" in images._look_at_image(str(tmp_path / "cut.jpg"), False)
    assert images._look_at_image(str(large), False) is None


def test_the_side_that_a_processor_needs():
    def side(**options):
        return images.resized_side(MobileNetV2ImageProcessorPil(**options))

    assert side(size={"height": 64, "width": 96}) == 96 and side(size={"shortest_edge": 256}) == 256
    assert side(size={"shortest_edge": 256}, do_resize=False) is None
    assert images.resized_side(ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875)) == 256
    parts = [MobileNetV2ImageProcessorPil(size={"height": s, "width": s}) for s in (64, 128)]
    assert images.resized_side(combined(parts)) == 128 and images.resized_side(object()) is None


def test_large_images_of_a_batch_are_opened_in_threads_and_in_order(large, tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.jpg" for number in range(5)]
    for number, file in enumerate(files):
        Image.new("RGB", (40, 30 + number)).save(file)
    threads, opened = set(), images.open_rgb
    monkeypatch.setattr(images, "open_rgb", lambda *a: threads.add(threading.get_ident()) or opened(*a))
    values = [{"path": str(file), "bytes": None} for file in (large, *files)]
    found = images.open_batch(values, range(6), 90)
    assert [image.size for image in found] == [(300, 225), *((40, 30 + number) for number in range(5))]
    assert threading.get_ident() not in threads
    threads.clear()
    assert len(images.open_batch(values[1:], range(5), 90)) == 5 and threads == {threading.get_ident()}


@pytest.mark.parametrize("hidden", [False, True])
def test_progress_is_shown_unless_hidden(large, monkeypatch, hidden):
    shown = []

    def tqdm(**options):
        shown.append((options["desc"], options["total"], options["disable"]))
        return nullcontext(SimpleNamespace(update=lambda *_: None))

    monkeypatch.setattr(progress, "tqdm", tqdm)
    monkeypatch.setattr(progress, "_hidden", False)
    progress.hide_bars(hidden)
    split = datasets.Dataset.from_dict({"image": [str(large)] * 2, "label": [0, 1]}).cast_column(
        "image", datasets.Image()
    )
    splits = datasets.DatasetDict(train=split)
    columns = find_columns(splits)
    check_images(splits, columns)
    processor = MobileNetV2ImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    held(prepare(splits, processor, columns)["train"])
    assert shown == [("opening images", 2, hidden or None), ("reading samples", 2, hidden or None)]
