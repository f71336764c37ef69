"""What may be shared: names instead of paths, and no secrets."""

import pytest

from hf_ft.documents.public import shareable, shareable_command, shareable_name, shareable_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the file /home/ann/photos/cat.png is damaged", "the file cat.png is damaged"),
        ("cannot open '/data/ann/x y.png'.", "cannot open 'x y.png'."),
        (r"C:\Users\ann\cat.png: no image", "cat.png: no image"),
        ("file:///home/ann/model", "file:///model"),
        ("sqlite:////home/ann/study.db", "sqlite:///study.db"),
        ("mysql+pymysql://ann:secret@host/studies", "mysql+pymysql://***@host/studies"),
        ("https://hub?token=secret&x=1", "https://hub?token=***&x=1"),
        ("401 for hf_abcdefghijkl", "401 for hf_***"),
        # What is not a path of this machine is kept.
        ("https://huggingface.co/google/vit", "https://huggingface.co/google/vit"),
        ("google/vit and 3/4 of a/b/c; lr 1e-3 / 2", "google/vit and 3/4 of a/b/c; lr 1e-3 / 2"),
    ],
)
def test_text(text, shown):
    assert shareable_text(text) == shown
    assert shareable({"a": [text], "b": (text, 1, None)}) == {"a": [shown], "b": (shown, 1, None)}


def test_text_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/ann lee")
    assert "ann" not in shareable_text("no file /srv/ann lee/my photos/a.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("google/vit", "google/vit"),
        ("mobilenet_v2", "mobilenet_v2"),
        ("/home/ann/model/", "model"),
        ("../ann/model", "model"),
        ("~/model", "model"),
        ("runs/ann/model", "model"),
        (r"C:\Users\ann\model", "model"),
    ],
)
def test_name(name, shown):
    assert shareable_name(name) == shown


def test_name_of_a_folder_that_looks_like_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "model").mkdir(parents=True)
    assert shareable_name("ann/model") == "model"


def test_command():
    words = "hf-ft compare --model /home/ann/m --dataset=./photos --hub_token secret --storage=mysql://ann:x@host/d "
    words += "--amcf.source_models /home/ann/a,google/vit --blockwise.storage /home/ann/b.db --advise --seeds 2"
    assert shareable_command(words.split()) == (
        "hf-ft compare --model m --dataset=photos --amcf.source_models a,google/vit --advise --seeds 2"
    )
