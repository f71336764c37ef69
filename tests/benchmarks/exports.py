"""How large and how fast exported models are: `python tests/benchmarks/exports.py`.

Networks of common sizes with random weights, which affect neither, are exported and run with one thread on one sample,
alternating with the model itself in PyTorch, whose shortest time is the unit; times are processor times. With
`--cells`, a head is trained on MobileNetV2 with ImageNet weights on images of solar cells, and the loss from int8 is
measured on other cells.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers as hf
from datasets import DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import TrainingArguments

import hf_ft
from hf_ft.data.columns import Columns
from hf_ft.data.prepare import prepare
from hf_ft.exports.runtimes import in_torch
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import elpv
from hf_ft.zoo.models import load_model

PIXELS = {"pixel_values": torch.randn(1, 3, 224, 224)}
TOKENS = {"input_ids": torch.randint(5, 30_000, (1, 128)), "attention_mask": torch.ones(1, 128, dtype=torch.long)}


def tokenizer() -> Any:
    words = {f"w{number}": number for number in range(100)}
    raw = Tokenizer(models.WordLevel({"[PAD]": 100, "[UNK]": 101, **words}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


def cases() -> dict[str, tuple[Any, Any, dict[str, torch.Tensor]]]:
    small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    image = hf.ViTImageProcessorPil()
    resnet = hf.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=10)
    vit = hf.ViTConfig(**small, num_labels=10)
    text = hf.BertConfig(**small | {"num_attention_heads": 12}, num_hidden_layers=6, num_labels=10)
    return {
        "ResNet-18": (hf.ResNetForImageClassification(resnet), image, PIXELS),
        "ViT-S/16": (hf.ViTForImageClassification(vit), image, PIXELS),
        "MiniLM-L6": (hf.BertForSequenceClassification(text), tokenizer(), TOKENS),
    }


def runs(model: Any, folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    feed = {name: value.numpy() for name, value in inputs.items()}
    found: dict[str, Callable[[], Any]] = {"PyTorch": lambda: in_torch(model)(inputs)}
    for file in sorted(folder.glob("*.onnx")):
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found[file.name] = lambda session=session: session.run(["logits"], feed)
    program = torch.export.load(folder / "model.pt2").module()
    found["model.pt2"] = lambda: program(**inputs)
    return found


def measure(name: str, model: Any, processor: Any, inputs: dict[str, torch.Tensor], turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        done = hf_ft.export(model, folder, processor=processor, formats=("onnx", "pt2"), quantize="int8")
        ways = runs(model.eval(), Path(folder), inputs)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(turns):
            for way, run in ways.items():
                start = time.process_time()
                run()
                seconds[way].append(time.process_time() - start)
    unit = min(seconds["PyTorch"])
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    print(f"{name}: weights {weights / 1e6:.1f} MB, PyTorch {1000 * unit:.1f} ms")
    for way, times in seconds.items():
        size = done.content["files"].get(way, {}).get("bytes", weights)
        print(f"  {way:<16}{size / 1e6:>8.1f} MB  time {min(times) / unit:.2f}")


def cells(folder: Path) -> None:
    """The scores on 500 cells of a MobileNetV2 with a head trained on other solar cells."""
    splits = stratified_split(elpv().remove_columns("cell_type"), 500, 0, 500)
    names = tuple(splits["train"].features["label"].names)
    model, processor = load_model("mobilenet_v2", id2label=dict(enumerate(names)), image_size=96)
    columns = Columns("image", ("image",), "label", "single_label_classification", names)
    arguments: dict[str, Any] = {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no"}
    arguments |= {"num_train_epochs": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 32, "disable_tqdm": True}
    data = prepare(DatasetDict(train=splits["train"]), processor, columns)["train"]
    args = TrainingArguments(str(folder), use_cpu=True, **arguments)
    hf_ft.FTTrainer(model, args, strategy="linear_probe", train_dataset=data, processing_class=processor).train()
    done = hf_ft.export(model, folder, data=splits["test"], processor=processor, quantize="int8")
    print(f"MobileNetV2 on solar cells: accuracy {done.content['check']['scores']['accuracy']:.3f}")
    for name in ("model.onnx", "model.int8.onnx"):
        told = done.content["files"][name]
        print(
            f"  {name:<16}{told['bytes'] / 1e6:>8.1f} MB  accuracy {told['scores']['accuracy']:.3f}  "
            f"agreement {told['agreement']:.3f}  largest difference {told['largest_difference']:.2g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--only", help="the name of one network")
    parser.add_argument("--cells", action="store_true", help="measure what int8 costs instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cells:
        with tempfile.TemporaryDirectory() as folder:
            cells(Path(folder))
        return
    for name, case in cases().items():
        if options.only in (None, name):
            measure(name, *case, options.turns)


if __name__ == "__main__":
    main()
