"""Fine-tune an audio classifier on a folder with one subfolder of sounds per class.

    python examples/train_audio.py --model facebook/wav2vec2-base --data sounds/ --strategy lp_ft
    python examples/train_audio.py --model facebook/wav2vec2-base            # on tones that it generates

Needs `pip install 'hf-ft[audio]'`. On a machine without a GPU, add `--use_cpu True`; every flag of TrainingArguments
works.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.io import wavfile
from transformers import HfArgumentParser, TrainingArguments

from hf_ft import FTTrainer
from hf_ft.data import collate, find_columns, load_splits, prepare
from hf_ft.metrics import classification_metrics
from hf_ft.zoo import load_model


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or folder of an audio classifier or backbone."})
    data: str | None = field(default=None, metadata={"help": "Folder of class folders; default: generated tones."})
    strategy: list[str] = field(default_factory=lambda: ["lp_ft"], metadata={"help": "One or more of `hf-ft list`."})
    max_seconds: float = field(default=5.0, metadata={"help": "Length to which sounds are cut."})


def make_tones(folder: Path, each: int = 20, rate: int = 8000) -> Path:
    """Noisy tones of two pitches, a quarter of a second long."""
    random, times = np.random.default_rng(0), np.arange(rate // 4) / rate
    for name, pitch in {"low": 200, "high": 800}.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            tone = 0.5 * np.sin(2 * np.pi * pitch * times) + random.normal(0, 0.05, len(times))
            wavfile.write(folder / name / f"{number}.wav", rate, tone.astype(np.float32))
    return folder


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(output_dir="runs/audio", remove_unused_columns=False, eval_strategy="epoch")
    script, args = parser.parse_args_into_dataclasses()

    with tempfile.TemporaryDirectory() as folder:
        splits = load_splits(script.data or str(make_tones(Path(folder, "tones"))), seed=args.seed)
        columns = find_columns(splits)
        model, extractor = load_model(script.model, id2label=columns.id2label, task="audio", seed=args.seed)
        ready = prepare(splits, extractor, columns, seconds=script.max_seconds)
        trainer = FTTrainer(
            model,
            args,
            strategy=script.strategy,
            train_dataset=ready["train"],
            eval_dataset=ready["validation"],
            processing_class=extractor,
            data_collator=collate(extractor),
            compute_metrics=classification_metrics,
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        metrics = trainer.evaluate()
    trainer.save_model()  # a plain Transformers checkpoint, with the feature extractor
    if trainer.is_world_process_zero():
        print(f"{trainer.args.world_size} process(es), accuracy {metrics['eval_accuracy']:.3f}: {args.output_dir}")


if __name__ == "__main__":
    main()
