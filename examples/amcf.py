"""Fine-tune several pretrained image classifiers together; a swarm finds how many layers of each to freeze.

    python examples/amcf.py --sources microsoft/resnet-50 google/mobilenet_v2_1.0_224 --data photos/
    python examples/amcf.py --sources ... --data photos/ --frozen 30 20
    accelerate launch --multi_gpu --num_processes 2 examples/amcf.py --sources ... --data ...

`--data` is a folder with one subfolder per class. Processes share the search. On a machine without a GPU, add
`--use_cpu True`; every flag of TrainingArguments works, with the strategy's recommendations as defaults.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForImageClassification, HfArgumentParser, TrainingArguments

import hf_ft
from hf_ft import AMCFConfig
from hf_ft.data import collate, find_columns, prepare
from hf_ft.metrics import classification_metrics


@dataclass
class Arguments:
    sources: list[str] = field(metadata={"help": "Hub ids or folders of image classifiers; one may occur twice."})
    data: str = field(metadata={"help": "Folder of class folders."})
    frozen: list[int] = field(
        default_factory=list, metadata={"help": "Frozen layers of each source; default: search for them."}
    )
    consistency: float = field(default=0.2, metadata={"help": "Weight of the consistency term."})
    particles: int = field(default=10, metadata={"help": "Number of particles in the swarm."})
    iterations: int = field(default=5, metadata={"help": "Number of swarm iterations."})
    search_epochs: int = field(default=5, metadata={"help": "Epochs per training run of the search."})


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(output_dir="runs/amcf", remove_unused_columns=False, eval_strategy="epoch")
    # As AMCF recommends for networks with BatchNorm.
    parser.set_defaults(learning_rate=2e-4, warmup_steps=0.1, lr_scheduler_type="cosine", max_grad_norm=0.0)
    script, args = parser.parse_args_into_dataclasses()

    splits = load_dataset("imagefolder", data_dir=script.data, split="train")
    splits = splits.train_test_split(0.2, seed=args.seed, stratify_by_column="label")
    splits["validation"] = splits.pop("test")
    columns = find_columns(splits)
    model, processor = hf_ft.load_sources(script.sources, id2label=columns.id2label, seed=args.seed)
    ready, plain = (prepare(splits, processor, columns, augment=kind) for kind in ("basic", "none"))

    strategy = AMCFConfig(
        source_models=script.sources,
        consistency=script.consistency,
        frozen=script.frozen or "search",
        particles=script.particles,
        iterations=script.iterations,
        search_epochs=script.search_epochs,
    )
    trainer = hf_ft.FTTrainer(
        model,
        args,
        strategy=strategy,
        train_dataset=ready["train"],
        plain_train_dataset=plain["train"],  # for the search
        eval_dataset=ready["validation"],
        processing_class=processor,
        data_collator=collate(processor),
        compute_metrics=classification_metrics,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        if trainer.states:
            print(strategy.scores(trainer.states["amcf"]).verdict())
        print(f"{trainer.args.world_size} process(es), accuracy {metrics['eval_accuracy']:.3f}: {args.output_dir}")
        alone = AutoModelForImageClassification.from_pretrained(args.output_dir, subfolder="member_0")
        print(f"a member by itself, a plain checkpoint: {type(alone).__name__}")


if __name__ == "__main__":
    main()
