"""Fine-tune an image classifier on a folder with one subfolder per class.

    python examples/train_image.py --model google/vit-base-patch16-224-in21k --data photos/ --strategy lp_ft
    accelerate launch --multi_gpu --num_processes 2 examples/train_image.py --model ... --data ...

On a machine without a GPU, add `--use_cpu True`; every flag of TrainingArguments works.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, TrainingArguments

from hf_ft import FTTrainer
from hf_ft.data import collate, find_columns, prepare
from hf_ft.metrics import classification_metrics


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or folder of an image classifier or backbone."})
    data: str = field(metadata={"help": "Folder of class folders."})
    strategy: list[str] = field(default_factory=lambda: ["lp_ft"], metadata={"help": "One or more of `hf-ft list`."})


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(output_dir="runs/image", remove_unused_columns=False, eval_strategy="epoch")
    script, args = parser.parse_args_into_dataclasses()

    splits = load_dataset("imagefolder", data_dir=script.data, split="train")
    splits = splits.train_test_split(0.2, seed=args.seed, stratify_by_column="label")
    splits["validation"] = splits.pop("test")
    columns = find_columns(splits)

    processor = AutoImageProcessor.from_pretrained(script.model)
    model = AutoModelForImageClassification.from_pretrained(
        script.model,
        num_labels=columns.num_labels,
        id2label=columns.id2label,
        ignore_mismatched_sizes=True,
    )
    ready = prepare(splits, processor, columns, augment="basic")  # flips and shifts, for training images only

    trainer = FTTrainer(
        model,
        args,
        strategy=script.strategy,
        train_dataset=ready["train"],
        eval_dataset=ready["validation"],
        processing_class=processor,
        data_collator=collate(processor),
        compute_metrics=classification_metrics,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()  # a plain Transformers checkpoint
    if trainer.is_world_process_zero():
        print(f"{trainer.args.world_size} process(es), accuracy {metrics['eval_accuracy']:.3f}: {args.output_dir}")


if __name__ == "__main__":
    main()
