"""Fine-tune a text classifier on a CSV file with the columns `text` and `label`.

    python examples/train_text.py --model distilbert-base-uncased --data reviews.csv --strategy gradual_unfreezing
    accelerate launch --multi_gpu --num_processes 2 examples/train_text.py --model ... --data ...

On a machine without a GPU, add `--use_cpu True`; every flag of TrainingArguments works.
"""

from dataclasses import dataclass, field

from datasets import ClassLabel, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, TrainingArguments

from hf_ft import FTTrainer
from hf_ft.metrics import classification_metrics


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or folder of a text classifier or encoder."})
    data: str = field(metadata={"help": "A csv file with the columns text and label."})
    strategy: list[str] = field(default_factory=lambda: ["gradual_unfreezing"], metadata={"help": "See `hf-ft list`."})
    max_length: int = field(default=128, metadata={"help": "Maximum number of tokens; longer texts are truncated."})


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(output_dir="runs/text", eval_strategy="epoch")
    script, args = parser.parse_args_into_dataclasses()

    rows = load_dataset("csv", data_files=script.data, split="train")
    if not isinstance(rows.features["label"], ClassLabel):
        rows = rows.class_encode_column("label")
    names = rows.features["label"].names
    splits = rows.train_test_split(0.2, seed=args.seed, stratify_by_column="label")

    tokenizer = AutoTokenizer.from_pretrained(script.model)
    splits = splits.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=script.max_length),
        batched=True,
        remove_columns=["text"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    trainer = FTTrainer(
        model,
        args,
        strategy=script.strategy,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()  # a plain Transformers checkpoint
    if trainer.is_world_process_zero():
        print(f"{trainer.args.world_size} process(es), accuracy {metrics['eval_accuracy']:.3f}: {args.output_dir}")


if __name__ == "__main__":
    main()
