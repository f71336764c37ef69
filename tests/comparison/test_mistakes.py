"""Mistakes are listed by names that reveal no more about the machine than necessary, and shown on request."""

import base64
from io import BytesIO

import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value

from hf_ft import OptionError
from hf_ft.comparison import Settings
from hf_ft.comparison.mistakes import LETTERS, check_thumbnails, samples
from hf_ft.data.columns import ROW, Columns

PLAIN, SHOWN = Settings(), Settings(thumbnails=True)
SINGLE = "single_label_classification"


def test_images_are_named_by_file_and_by_folder_if_that_is_their_class(tmp_path):
    files = [tmp_path / "cat" / "a.png", tmp_path / "cat" / "b.png"]
    files[0].parent.mkdir()
    for file in files:
        PIL.Image.new("RGB", (200, 100), (255, 0, 0)).save(file)
    buffer = BytesIO()
    PIL.Image.new("L", (10, 20)).save(buffer, "PNG")
    values = [*map(str, files), {"path": None, "bytes": buffer.getvalue()}]
    values = [{"path": value, "bytes": None} if isinstance(value, str) else value for value in values]
    split = Dataset.from_dict({"image": values}, features=Features(image=Image()))
    columns = Columns("image", ("image",), "label", SINGLE, ("cat", "dog"))
    names, nothing = samples(split, columns, [2, 1, 0], [0, 1, 1], PLAIN)
    assert names == ["row 2", "b.png", "cat/a.png"] and nothing == ["", "", ""]  # the class of b.png is dog
    names, shown = samples(split, columns, [0, 2], [0, 1, 1], SHOWN)
    assert names == ["cat/a.png", "row 2"]
    sizes = [PIL.Image.open(BytesIO(base64.b64decode(one.partition(",")[2]))).size for one in shown]
    assert sizes == [(64, 32), (10, 20)] and all(one.startswith("data:image/jpeg;base64,") for one in shown)
    files[0].unlink()
    assert samples(split, columns, [0], [0, 1, 1], SHOWN)[1] == [""]


def test_texts_are_named_by_their_row_in_the_source():
    features = Features({"text": Value("string"), "more": Value("string"), ROW: Value("int64")})
    content = {"text": ["a", "b" * 200], "more": ["c", "d"], ROW: [17, 4]}
    split, columns = Dataset.from_dict(content, features=features), Columns("text", ("text", "more"), "label", SINGLE)
    assert samples(split, columns, [1, 0], [0, 0], PLAIN) == (["row 4", "row 17"], ["", ""])
    assert samples(split, columns, [1, 0], [0, 0], SHOWN)[1] == ["b" * LETTERS, "a | c"]


def test_sounds_have_no_thumbnails():
    with pytest.raises(OptionError, match="thumbnails=True: these data are sounds"):
        check_thumbnails(SHOWN, Columns("audio", ("audio",), "label", SINGLE))
    check_thumbnails(PLAIN, Columns("audio", ("audio",), "label", SINGLE))
