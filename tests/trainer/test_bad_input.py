"""Each mistake raises a message with field, value and fix, before anything is trained or written."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import nn

import hf_ft
from hf_ft import (
    DELTAConfig,
    FTConfig,
    FTTrainer,
    FullConfig,
    GradualUnfreezingConfig,
    L2SPConfig,
    LayerDecayConfig,
    LinearProbeConfig,
    LPFTConfig,
    Plan,
    Stage,
    compose,
)
from hf_ft.cli.request import read
from hf_ft.comparison.settings import training_arguments
from hf_ft.core.compose import build_plan
from hf_ft.core.config import load_configs
from hf_ft.core.options import annotation, parse
from hf_ft.models.norms import batch_norms
from hf_ft.testing import tiny_data, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer, tiny_arguments
from hf_ft.trainer.checks import COUNTS, warn_slow_statistics
from hf_ft.trainer.sharding import check_accelerator, check_whole


def refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match):
        function(*args, **kwargs)


def test_unknown_strategy(tmp_path):
    refused(
        "unknown strategy 'lpft'. Did you mean 'lp_ft'.*linear_probe", make_trainer, tiny_resnet(), "lpft", tmp_path
    )
    refused("not a strategy.*L2SPConfig", make_trainer, tiny_resnet(), [3], tmp_path)
    refused("not a strategy", make_trainer, tiny_resnet(), [], tmp_path)
    refused("not a strategy", make_trainer, tiny_resnet(), None, tmp_path)
    refused(r"Call it: LPFTConfig\(\)", make_trainer, tiny_resnet(), LPFTConfig, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: L2SPConfig(alpha=-1), r"L2SPConfig.alpha=-1 lies outside \[0, inf\). Default: 0.01"),
        (lambda: L2SPConfig(alpha="much"), "L2SPConfig.alpha='much' is not float"),
        (lambda: L2SPConfig(alpha=True), "is not float"),
        (lambda: L2SPConfig(alpha=float("nan")), "lies outside"),
        (lambda: LPFTConfig(probe=1.0), r"LPFTConfig.probe=1.0 lies outside \(0, 1\)"),
        (lambda: LPFTConfig(norm_mode="off"), 'LPFTConfig.norm_mode=.off. is not "auto" or "eval"'),
        (lambda: LayerDecayConfig(decay=1.5), r"decay=1.5 lies outside \(0, 1\]"),
        (lambda: GradualUnfreezingConfig(stages=1), "stages=1 lies outside"),
        (lambda: GradualUnfreezingConfig(stages=2.5), "stages=2.5 is not int"),
        (lambda: FullConfig(batch_norm_momentum=0), "batch_norm_momentum=0 lies outside"),
        (lambda: FullConfig(head=3), "head=3 is not str or None"),
    ],
)
def test_values(make, match):
    refused(match, make)


def test_unknown_option():
    with pytest.raises(TypeError, match="alhpa"):
        L2SPConfig(alhpa=1.0)


def test_more_stages_than_parts(tmp_path):
    refused(
        "stages=50 is too many for this model, which has a head and",
        make_trainer,
        tiny_resnet(),
        GradualUnfreezingConfig(stages=50),
        tmp_path,
    )


def test_nothing_is_written_before_the_checks(tmp_path):
    for strategy in (["lp_ft", "linear_probe"], GradualUnfreezingConfig(stages=50), LinearProbeConfig(head="no")):
        refused("both|too many|no module", make_trainer, tiny_resnet(), strategy, tmp_path / "out")
    data = tiny_data(tiny_vit(num_labels=5))
    refused("label", FTTrainer, tiny_vit(), tiny_arguments(tmp_path / "out"), train_dataset=data)
    assert not (tmp_path / "out").exists()


def test_two_stage_owners(tmp_path):
    refused("linear_probe and lp_ft both decide", make_trainer, tiny_resnet(), ["linear_probe", "lp_ft"], tmp_path)
    refused("l2_sp is given twice", make_trainer, tiny_resnet(), ["l2_sp", "l2_sp"], tmp_path)


def test_contradicting_common_options(tmp_path):
    pair = [L2SPConfig(batch_norm_momentum=0.2), LinearProbeConfig(batch_norm_momentum="keep")]
    refused(
        "l2_sp.batch_norm_momentum=0.2 and linear_probe.batch_norm_momentum='keep'",
        make_trainer,
        tiny_resnet(),
        pair,
        tmp_path,
    )


def test_predicates_that_match_nothing(tmp_path):
    from hf_ft.core.plan import trained_by

    model = tiny_resnet()
    names = [name for name, _ in model.named_parameters()]
    refused(
        "stage 's': 'clasifier' matches no parameter. Parameters include .*classifier",
        trained_by,
        Stage("s", ("clasifier",)),
        model,
        names,
    )
    model.classifier.requires_grad_(False)
    refused("frozen before training", make_trainer, model, "linear_probe", tmp_path)
    model.requires_grad_(False)
    refused("all parameters of the model are frozen", make_trainer, model, "full", tmp_path)


def test_stage_durations():
    refused("must be positive and sum to 1", compose, [Plan(stages=(Stage("a", duration=0.5),))])
    refused("must be positive", compose, [Plan(stages=(Stage("a", duration=1.5), Stage("b", duration=-0.5)))])


class Unknown(nn.Module):
    """A classifier that no naming convention fits."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, labels=None):
        logits = self.last(self.first(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def unknown_data():
    import datasets

    return datasets.Dataset.from_dict({"x": torch.randn(16, 4).numpy(), "labels": [0, 1] * 8}).with_format("torch")


def test_no_head_and_the_fix(tmp_path):
    arguments = {"train_dataset": unknown_data(), "args": tiny_arguments(tmp_path)}
    refused("Found no head.*first.*last.*head=", FTTrainer, Unknown(), strategy="linear_probe", **arguments)
    FTTrainer(Unknown(), strategy="full", **arguments).train()  # needs to know nothing about the model
    refused("no module 'lats'", FTTrainer, Unknown(), strategy=LinearProbeConfig(head="lats"), **arguments)


def test_a_head_and_blocks_that_the_model_lacks(tmp_path):
    """Even if the strategy needs neither."""
    refused("head='NaN': the model has no module 'NaN'", make_trainer, tiny_resnet(), FullConfig(head="NaN"), tmp_path)
    refused("Found no blocks by blocks='NaN'", make_trainer, tiny_resnet(), FullConfig(blocks="NaN"), tmp_path)
    make_trainer(tiny_resnet(), FullConfig(head="classifier"), tmp_path)


def test_labels_outside_the_head(tmp_path):
    data = tiny_data(tiny_vit(num_labels=5))
    refused(
        r"labels [34] of row \d+ lies outside \[0, 3\).*num_labels",
        FTTrainer,
        tiny_vit(),
        tiny_arguments(tmp_path),
        train_dataset=data,
    )


@pytest.mark.parametrize("name", COUNTS)
def test_batches_without_samples(name, tmp_path):
    refused(f"{name}=0 must be at least 1", make_trainer, tiny_vit(), "full", tmp_path / "out", **{name: 0})
    refused(f"{name}=-2 must be at least 1", training_arguments, {name: -2})
    assert not (tmp_path / "out").exists()


def test_no_complete_batch(tmp_path):
    """If incomplete ones are dropped, an epoch would have no step."""
    dropped = {"dataloader_drop_last": True, "per_device_train_batch_size": 33}  # there are 32 samples
    message = "dataloader_drop_last=True: 32 samples do not fill a batch of per_device_train_batch_size=33"
    refused(message, make_trainer, tiny_vit(), "full", tmp_path / "out", **dropped)
    assert not (tmp_path / "out").exists()
    make_trainer(tiny_vit(), "full", tmp_path, **dropped | {"per_device_train_batch_size": 32})


def test_smoothing_needs_one_class_per_sample(tmp_path):
    smoothed = {"label_smoothing_factor": 0.1}
    message = "label_smoothing_factor=0.1 needs single-label classification, but .* is regression"
    refused(message, make_trainer, tiny_vit(num_labels=1), "full", tmp_path / "out", **smoothed)
    assert not (tmp_path / "out").exists()
    make_trainer(tiny_vit(), "full", tmp_path, **smoothed)


def test_no_labels_at_all(tmp_path):
    data = tiny_data(tiny_vit()).remove_columns("labels")
    trainer = FTTrainer(tiny_vit(), tiny_arguments(tmp_path), train_dataset=data)
    refused("returned no loss.*column of labels", trainer.train)


def test_sharded_training_is_refused_by_name(tmp_path):
    args = tiny_arguments(tmp_path)
    args.fsdp = "full_shard"
    refused("args.fsdp='full_shard'.*DDP", FTTrainer, tiny_vit(), args, train_dataset=tiny_data(tiny_vit()))


def deepspeed(args):
    args.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(args)[1]


# What `accelerate launch` passes on, from flags and config files.
LAUNCHES = [
    ("fsdp", ["--use_fsdp"], prepare_multi_gpu_env),
    ("fsdp", {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, prepare_multi_gpu_env),
    ("deepspeed", ["--use_deepspeed", "--zero_stage=3"], deepspeed),
    ("deepspeed", {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, deepspeed),
    ("megatron_lm", ["--use_megatron_lm"], prepare_multi_gpu_env),
    ("parallelism_config", {"parallelism_config": {"parallelism_config_tp_size": 2}}, prepare_multi_gpu_env),
]


@pytest.mark.parametrize(("name", "asked", "environment"), LAUNCHES)
def test_sharding_set_by_the_launcher_is_refused_before_anything_is_loaded(
    name, asked, environment, tmp_path, monkeypatch
):
    if isinstance(asked, dict):
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": False, **asked}
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        asked = ["--config_file", str(tmp_path / "config.yaml")]
    with monkeypatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # validation sets it if it is not set
        args, *_ = _validate_launch_command(launch_command_parser().parse_args([*asked, "--num_processes=2", "t.py"]))
    given = tiny_arguments(tmp_path / "out")
    handed = {key: value for key, value in environment(args).items() if os.environ.get(key) != value}
    for key, value in handed.items():
        monkeypatch.setenv(key, value)
    message = rf"accelerate launch --use_{name} .*config file.*: sharded training .*not supported.*Use DDP"
    refused(message, FTTrainer, tiny_vit(), given, train_dataset=tiny_data(tiny_vit()))
    refused(message, read, ["--model", "nobody/nothing", "--dataset", "nobody/nothing"])
    assert not (tmp_path / "out").exists()


def test_sharding_flags_are_refused_before_anything_is_loaded():
    for flag in ("--fsdp=full_shard", "--deepspeed=ds.json"):
        refused(f"args.{flag[2:6]}.*sharded training", read, ["--model=nobody/nothing", "--dataset=none", flag])


def test_a_sharding_accelerator_or_model_is_always_refused():
    sharding = SimpleNamespace(distributed_type=DistributedType.FSDP)
    refused("set up for FSDP: sharded training .* is not supported", check_accelerator, sharding)
    check_accelerator(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU))
    model = tiny_vit()
    check_whole(model)
    model.config.distributed_config = object()
    refused("the model is sharded", check_whole, model)


def test_measuring_needs_a_length(tmp_path):
    from tests.trainer.measuring_strategy import MeasuredConfig

    data = tiny_data(tiny_vit()).to_iterable_dataset()
    given = {"args": tiny_arguments(tmp_path / "out"), "strategy": MeasuredConfig(), "train_dataset": data}
    message = "measured measures the training data first.*map-style.*measure_samples=256"
    refused(message, FTTrainer, tiny_vit(), **given)
    assert not (tmp_path / "out").exists()
    refused("pass a context", hf_ft.set_up, tiny_vit(), MeasuredConfig())


def test_damaged_config(tmp_path):
    refused("contains no ft_config.json", FTConfig.from_pretrained, tmp_path)
    L2SPConfig().save_pretrained(tmp_path)
    file = tmp_path / "ft_config.json"
    whole = file.read_text()
    file.write_text(whole[:40])
    refused("ft_config.json is damaged.*Restore it", FTConfig.from_pretrained, tmp_path)
    file.write_text('{"strategies": []}')
    refused("lists no strategies", FTConfig.from_pretrained, tmp_path)
    file.write_text(whole.replace("l2_sp", "l3_sp"))
    refused("unknown strategy 'l3_sp'", FTConfig.from_pretrained, tmp_path)
    file.write_text(whole.replace("0.01", '"x"'))
    refused("L2SPConfig.alpha='x'", FTConfig.from_pretrained, tmp_path)
    file.write_text('{"strategies": [{}]}')
    refused("no 'ft_type'", FTConfig.from_pretrained, tmp_path)
    refused("no such folder", FTConfig.from_pretrained, "nobody/nothing-here")


def test_a_config_of_a_newer_version_loads_with_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.core.config.logger.warning", said.append)
    L2SPConfig(alpha=0.5).save_pretrained(tmp_path)
    file = tmp_path / "ft_config.json"
    content = json.loads(file.read_text())
    content["hf_ft_version"] = "99.0"
    content["strategies"][0]["of_the_future"] = [1, 2]
    file.write_text(json.dumps(content))
    assert FTConfig.from_pretrained(tmp_path) == L2SPConfig(alpha=0.5)
    assert len(said) == 1 and "of_the_future" in said[0]


def test_several_configs_are_loaded_as_several(tmp_path):
    train(tiny_resnet(), [LPFTConfig(), L2SPConfig()], tmp_path).save_model()
    refused("holds 2 strategies.*load_configs", FTConfig.from_pretrained, tmp_path)
    assert load_configs(tmp_path) == (LPFTConfig(), L2SPConfig())


def test_config_is_pushed_like_a_peft_config(monkeypatch):
    pushed = {}

    def upload(self, folder, repo_id, **kwargs):
        import pathlib

        pushed[repo_id] = [path.name for path in pathlib.Path(folder).iterdir()]

    monkeypatch.setattr(FTConfig, "_upload_modified_files", upload)
    made = type("Made", (), {"repo_id": "me/config"})()
    monkeypatch.setattr("transformers.utils.hub.create_repo", lambda *a, **k: made, raising=False)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: made)
    L2SPConfig().push_to_hub("me/config")
    assert "ft_config.json" in pushed["me/config"]


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [("0.5", "alpha", 0.5), ("none", "head", None), ("a,b", "head", "a,b"), ("keep", "batch_norm_momentum", "keep")],
)
def test_parse(text, option, value):
    assert parse(text, annotation(L2SPConfig, option), option) == value


def test_parse_refuses():
    refused("alpha='much' is not float", parse, "much", annotation(L2SPConfig, "alpha"), "alpha")
    refused("norm_mode='on' is not", parse, "on", annotation(LPFTConfig, "norm_mode"), "norm_mode")


def test_an_empty_plan_is_plain_fine_tuning():
    assert build_plan([FullConfig()], tiny_resnet(), {}).stages == (Stage("train"),)


@pytest.mark.parametrize(("text", "value"), [("none", None), ("a.b", ("a.b",)), ("a.b,c", ("a.b", "c"))])
def test_parse_a_list_or_none(text, value):
    assert parse(text, annotation(DELTAConfig, "layers"), "layers") == value


@pytest.mark.parametrize(("momentum", "steps", "told"), [(0.01, 8, True), (0.01, 300, False), (0.1, 8, False)])
def test_statistics_that_cannot_follow_are_reported(momentum, steps, told, caplog):
    model = tiny_resnet()
    for _, norm in batch_norms(model):
        norm.momentum = momentum
    names = [name for name, _ in model.named_parameters()]
    with caplog.at_level("WARNING", logger="hf_ft"):
        warn_slow_statistics(model, names, steps)
        warn_slow_statistics(model, ["classifier.1.weight"], steps)  # those of frozen layers do not change
    assert ("in 8 steps, their running statistics move 8 % of the way" in caplog.text) == told
    assert len(caplog.records) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adam_beta1": 1e308}, "the optimizer cannot be created .*: Invalid beta parameter"),
        ({"lr_scheduler_kwargs": "x"}, "the learning rate schedule cannot be created .*must be a mapping"),
    ],
)
def test_what_torch_refuses_raises_an_option_error(arguments, message, tmp_path):
    args = tiny_arguments(tmp_path)
    for name, value in arguments.items():  # as from a file
        setattr(args, name, value)
    trainer = FTTrainer(tiny_resnet(), args, train_dataset=tiny_data(tiny_resnet()))
    refused(message, trainer.train)
