"""Trained models and data for them: photos in folders of classes, and reviews of different lengths."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_ft.testing.models import tiny_bert, tiny_resnet

CLASSES = ("cat", "dog", "eel")
NAMES = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
TRUTH = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def trained_files(root):
    """``photos/``, ``reviews.csv``, and a classifier for each, ``resnet`` and ``bert``."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(CLASSES):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 80, (40 + i, 32, 3), dtype=np.uint8) + np.uint8(80 * index)
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("no image")
    tiny_resnet(**NAMES).save_pretrained(root / "resnet")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "resnet")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film", "a", "very"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    tiny_bert(num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}).save_pretrained(
        root / "bert"
    )
    fast.save_pretrained(root / "bert")
    rows = [f"a {'very ' * i}{word} film,{word}" for i in range(5) for word in ("good", "bad")]
    (root / "reviews.csv").write_text("\n".join(["body,label", *rows]) + "\n")
    return root
