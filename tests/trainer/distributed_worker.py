"""Runs every strategy on one or two ranks and writes the results: `distributed_worker.py FOLDER RANKS`."""

import gc
import json
import os
import sys
from pathlib import Path

import optuna
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file

from hf_ft import (
    AMCFConfig,
    ChildTuningConfig,
    DAFTConfig,
    DELTAConfig,
    FrozenCache,
    LwFConfig,
    SoftConfig,
    WiSEFTConfig,
)
from hf_ft.core.config import strategies
from hf_ft.data.sampling import share_of_batches
from hf_ft.engine.checkpoint import digests
from hf_ft.models.norm_statistics import renew_statistics
from hf_ft.models.norms import batch_norms
from hf_ft.testing import still, suited, tiny_collaborative, tiny_data, tiny_resnet, tiny_vit
from hf_ft.testing.laws import _losses
from hf_ft.testing.training import make_trainer, same_tensors, snapshot
from tests import quick
from tests.models.heads import headed
from tests.trainer.measuring_strategy import MeasuredConfig

quick.set_up()
strategies()  # imported before the freeze
gc.collect()
gc.freeze()  # each training run collects garbage, which would scan everything that is imported
folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
logs, weights = {}, {}


def run(label, model, strategy, **arguments):
    arguments = {"optim": "sgd", "per_device_train_batch_size": 8 // ranks, **arguments}
    trainer = make_trainer(model, strategy, folder / f"{label}-{ranks}", **arguments)
    assert trainer.args.world_size == ranks, f"{trainer.args.world_size} ranks, not {ranks}"
    trainer.train()
    logs[label] = _losses(trainer)
    weights.update({f"{label}/{name}": value for name, value in snapshot(trainer.model).items()})
    return trainer


for turn, name in enumerate(strategies()):
    if name == "measured":
        continue
    # A term of a whole batch is the same only on the same micro-batches: two ranks, or two accumulated steps.
    couples = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // ranks} if name == "bss" else {}
    # A model with BatchNorm or one without, in turn; if a strategy has no form for it, the other.
    for make in (tiny_resnet, tiny_vit)[:: 1 if turn % 2 else -1]:
        # Variances within batches change with the batch size; pooled ones do not.
        options = {"daft": {"statistics": "pooled"}}
        short = {"search_epochs": 1, "storage": str(folder / f"{name}-{make.__name__}-{ranks}.log")}
        options |= {"blockwise": short, "amcf": {**short, "particles": 2, "iterations": 1}}
        few = {"choose_from": ("lp_ft", "linear_probe"), "budget": "3x"}
        options |= {"auto": {**few, "storage": short["storage"]}}
        # Its layers compute batch statistics in any mode, unless all stay pretrained.
        options |= {"stoch_norm": {"norm_mode": "eval"}}
        options |= {"spot_tune": {"noise": False}}  # it is drawn for each sample of a rank
        config = strategies()[name](**options.get(name, {}))
        if config.adapted(make()) is None:
            continue
        run(f"{name}-{make.__name__}", still(make()), suited(config, make()), **couples)
        break
# BatchNorm sees smaller batches on two ranks, so only agreement between ranks, and measurements, can be checked.
averaged = make_trainer(
    tiny_resnet(), WiSEFTConfig(alpha=0.5), folder / f"averaged-{ranks}", per_device_train_batch_size=8 // ranks
)
averaged.train()
found = snapshot(averaged.model)
for other in gather_object([digests(averaged.model)]):
    assert other == digests(averaged.model), "the ranks have different weights or statistics"
moving = [name for name, _ in batch_norms(averaged.model)]
order = share_of_batches(len(averaged.train_dataset), 8 // ranks, averaged.args.seed, 0, 1)
renew_statistics(averaged.model, moving, [averaged.train_dataset[rows] for rows in order])
same_tensors(found, snapshot(averaged.model), 1e-6)

run("masks of each step", still(tiny_vit()), ChildTuningConfig(mode="F"))
run("composed", still(tiny_resnet()), ["lp_ft", "l2_sp"])
run("from a file", still(tiny_resnet()), "lp_ft", frozen_cache=FrozenCache("always", memory_gb=0.0, folder=str(folder)))
assert not list(folder.glob("hf_ft_frozen_*")), "the file was left behind"
run("a head per token", still(headed("gpt2")), LwFConfig(train_source_head=True))
run("several members", still(tiny_collaborative()), AMCFConfig(frozen=(2, 10)))
run("several members, one still", still(tiny_collaborative()), AMCFConfig(frozen=(0, 21)), frozen_cache="never")

# A swarm's positions are shared by the ranks: each is trained once, with the same step size as on one rank.
searching = AMCFConfig(particles=3, iterations=1, search_epochs=1, metric="loss")
searched = run("several members, searched", still(tiny_collaborative()), searching)
url = f"sqlite:///{searched.args.output_dir}/swarm_search.db"
trials = optuna.load_study(study_name=optuna.get_all_study_names(url)[0], storage=url).get_trials()
complete = [trial.user_attrs["job"] for trial in trials if trial.state.name == "COMPLETE"]
found = searching.scores(searched.states["amcf"])
assert sorted(complete) == sorted("-".join(map(str, e.position)) for e in found.evaluations), complete

run(
    "accumulated",
    still(tiny_vit()),
    ["lp_ft", "l2_sp"],
    per_device_train_batch_size=4 // ranks,
    gradient_accumulation_steps=2,
)

# Two batches per step, then one: parameters of the source head no longer get a gradient.
run("soft, separate", still(tiny_resnet()), SoftConfig(source_forward="separate", source_ratio=0.5, schedule="step"))
run(
    "soft, accumulated",
    still(tiny_vit()),
    SoftConfig(until=0.75),
    per_device_train_batch_size=4 // ranks,
    gradient_accumulation_steps=2,
)

# A term that trains, and is left out because all its inputs are frozen.
run("lwf, linear probe", still(tiny_resnet()), [LwFConfig(train_source_head=True), "linear_probe"])

# Frozen parts are computed once, each rank its share, with the same result (the shares of 37 samples are unequal).
for name in ("linear_probe", "gradual_unfreezing"):
    found = {}
    for use in ("never", "always"):
        trainer = make_trainer(still(tiny_resnet()), name, folder / use, use, max_steps=12, optim="sgd",
                               per_device_train_batch_size=8 // ranks, eval_strategy="steps", eval_steps=4)  # fmt: skip
        trainer.train_dataset = trainer.train_dataset.select([i % 32 for i in range(37)])
        trainer.train()
        found[use] = snapshot(trainer.model)
    same_tensors(found["never"], found["always"], 1e-6)

# Reference states likewise.
found = {}
for use in ("never", "always"):
    trainer = make_trainer(still(tiny_resnet()), DELTAConfig(weights="uniform"), folder / use, use, max_steps=12,
                           optim="sgd", per_device_train_batch_size=8 // ranks)  # fmt: skip
    trainer.train_dataset = trainer.train_dataset.select([i % 32 for i in range(37)])
    trainer.train()
    found[use] = snapshot(trainer.model)
same_tensors(found["never"], found["always"], 1e-6)

# One batch of each data set, so that the second rank has none to compute.
trainer = make_trainer(still(tiny_resnet()), "linear_probe", folder / "one", "always", max_steps=12, optim="sgd",
                       eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=64)  # fmt: skip
trainer.train()
assert bool(torch.isfinite(torch.tensor(trainer.state.log_history[-2]["eval_loss"])))

# The last batch of 37 samples is padded on the first rank, that of 45 on the second: each sample counts once.
trainer = make_trainer(tiny_vit(), "full", folder / "evaluated", per_device_eval_batch_size=8)
for samples in (37, 45):
    loss = trainer.evaluate(tiny_data(tiny_vit(), samples, seed=3))["eval_loss"]
    weights[f"evaluation/{samples}"] = torch.tensor(loss)

# Each of 37 samples is read once, and all ranks have the same state, bit for bit.
trainer = make_trainer(tiny_vit(), MeasuredConfig(), folder / "measured")
trainer.train_dataset = trainer.train_dataset.select([i % 32 for i in range(37)])
state = trainer._states()["measured"]
assert state.info["values"] == 37 * 3 * 32 * 32, state.info
gathered = trainer.accelerator.gather(state.tensors["mean"].reshape(1))
assert bool((gathered == gathered[0]).all())
weights["measured/mean"] = state.tensors["mean"].float()
run("term that trains", still(tiny_vit()), MeasuredConfig())

# BatchNorm statistics: 500 images in batches of 32, and 20 images, which leave the second rank without a batch.
for statistics in ("batch", "pooled"):
    for samples in (500, 20):
        trainer = make_trainer(tiny_resnet(), DAFTConfig(statistics=statistics), folder / "daft",
                               per_device_train_batch_size=32)  # fmt: skip
        assert trainer.args.world_size == ranks
        trainer.train_dataset = tiny_data(tiny_resnet(), samples)
        for key, value in trainer._states()["daft"].tensors.items():
            assert bool((trainer.accelerator.gather(value[None]) == value).all()), key
            weights[f"moments/{statistics}-{samples}/{key}"] = value

# Saved, the best loaded, and resumed across a stage boundary.
saving = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
whole = run("saved", still(tiny_resnet()), "lp_ft", load_best_model_at_end=True, metric_for_best_model="loss", **saving)
trainer = make_trainer(still(tiny_resnet()), "lp_ft", folder / f"saved-{ranks}", optim="sgd",
                       per_device_train_batch_size=8 // ranks, load_best_model_at_end=True,
                       metric_for_best_model="loss", **saving)  # fmt: skip
trainer.train(resume_from_checkpoint=str(folder / f"saved-{ranks}" / "checkpoint-3"))
same_tensors(snapshot(trainer.model), snapshot(whole.model))

# Likewise with an average of the weights, which is saved, loaded and left; the live weights continue.
averaged = ["lp_ft", "l2_sp", "ema"]
whole = run("averaged", still(tiny_resnet()), averaged, load_best_model_at_end=True, **saving)
trainer = make_trainer(still(tiny_resnet()), averaged, folder / f"averaged-{ranks}", optim="sgd",
                       per_device_train_batch_size=8 // ranks, load_best_model_at_end=True, **saving)  # fmt: skip
trainer.train(resume_from_checkpoint=str(folder / f"averaged-{ranks}" / "checkpoint-3"))
same_tensors(snapshot(trainer.model), snapshot(whole.model))
for tensor in snapshot(trainer.model).values():
    assert bool((trainer.accelerator.gather(tensor[None].float()) == tensor).all()), "the ranks differ"

# A stream continues where each rank left it.
for source in ("rows", "streaming"):
    ends = []
    for resume in (None, str(folder / f"soft-{source}-{ranks}" / "checkpoint-3")):
        trainer = make_trainer(still(tiny_resnet()), SoftConfig(until=0.75), folder / f"soft-{source}-{ranks}",
                               optim="sgd", per_device_train_batch_size=8 // ranks, **saving)  # fmt: skip
        if source == "streaming":
            trainer.source_dataset = trainer.source_dataset.to_iterable_dataset(num_shards=4)
        trainer.train(resume_from_checkpoint=resume)
        ends.append(snapshot(trainer.model))
    same_tensors(*ends)

if int(os.environ.get("RANK", 0)) == 0:
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"weights-{ranks}.safetensors")
    (folder / f"logs-{ranks}.json").write_text(json.dumps(logs))
