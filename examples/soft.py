"""Fine-tune an image classifier together with its pretraining data, whose loss is gradually removed.

    python examples/soft.py --model microsoft/resnet-50 --data photos/ --source pretraining_photos/
    accelerate launch --multi_gpu --num_processes 2 examples/soft.py --model ... --data ... --source ...

Both folders have one subfolder per class; the source's are named after the model's classes. On a machine without a
GPU, add `--use_cpu True`; every flag of TrainingArguments works.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoImageProcessor, HfArgumentParser, TrainingArguments

import hf_ft
from hf_ft.data import collate, find_columns, prepare
from hf_ft.metrics import classification_metrics


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or folder of a classifier, whose head is kept alongside the new one."})
    data: str = field(metadata={"help": "Target data: folder of class folders."})
    source: str = field(metadata={"help": "Source data: folder of class folders, all or part of the pretraining data."})
    schedule: str = field(default="linear", metadata={"help": "linear, cosine, exponential, step or constant."})


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(output_dir="runs/soft", remove_unused_columns=False, eval_strategy="epoch")
    script, args = parser.parse_args_into_dataclasses()

    target = load_dataset("imagefolder", data_dir=script.data, split="train")
    target = target.train_test_split(0.2, seed=args.seed, stratify_by_column="label")
    target["validation"] = target.pop("test")
    source = load_dataset("imagefolder", data_dir=script.source)

    columns = find_columns(target)
    processor = AutoImageProcessor.from_pretrained(script.model)
    model = hf_ft.from_pretrained(script.model, id2label=columns.id2label)
    ready = prepare(target, processor, columns, augment="basic")

    trainer = hf_ft.FTTrainer(
        model,
        args,
        strategy=hf_ft.SoftConfig(schedule=script.schedule, source_label_map="by_name"),
        train_dataset=ready["train"],
        eval_dataset=ready["validation"],
        source_dataset=prepare(source, processor, find_columns(source), augment="basic")["train"],
        processing_class=processor,
        data_collator=collate(processor),
        compute_metrics=classification_metrics,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()  # a plain Transformers checkpoint, without the source head
    if trainer.is_world_process_zero():
        print(f"{trainer.args.world_size} process(es), accuracy {metrics['eval_accuracy']:.3f}: {args.output_dir}")


if __name__ == "__main__":
    main()
