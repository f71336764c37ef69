"""Sharded parameters (FSDP2): their training, and what is rejected by name before anything is loaded."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn

from hf_ft import FTTrainer, OptionError
from hf_ft.cli.request import read
from hf_ft.core.config import strategies
from hf_ft.testing import tiny_data, tiny_resnet, tiny_vit
from hf_ft.testing.training import tiny_arguments
from hf_ft.trainer.sharding import check_shardable
from tests.forked import python
from tests.models.heads import headed

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.slow
def test_two_ranks_train_shards_as_two_ranks_train_the_whole(tmp_path):
    done = python(WORKER, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("all: ") == 2


@pytest.fixture
def sharding(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it

    def arguments(settings=(), **more):
        return tiny_arguments(tmp_path / "out", fsdp=True, fsdp_config={"version": 2, **dict(settings)}, **more)

    return arguments


def refused(message, args, strategy="full", **keywords):
    with pytest.raises(OptionError, match=message):
        FTTrainer(tiny_vit(), args, strategy=strategy, train_dataset=tiny_data(tiny_vit()), **keywords)
    assert not Path(args.output_dir).exists()


def test_strategies_that_need_the_whole_model_are_refused_by_name(sharding):
    for names in (["delta"], ["full", "ema"], ["daft"], ["peft"], ["auto_rgn"]):
        refused(f"{names[-1]} cannot train a model whose parameters are sharded", sharding(), names)
    carried = {name for name, kind in strategies().items() if kind().needs().sharded}
    staged = {"linear_probe", "lp_ft", "gradual_unfreezing"}
    assert carried == staged | {"full", "l2_sp", "layer_decay", "bss", "wise_ft"}


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"version": 1}, {}, "args.fsdp=.*FSDP1"),
        ({"cpu_ram_efficient_loading": True}, {}, "cpu_ram_efficient_loading=True.*Set it to false"),
        ({"reshard_after_forward": False}, {}, "reshard_after_forward=False.*Set it to true"),
        ({"activation_checkpointing": True}, {}, "activation_checkpointing=True.*gradient_checkpointing"),
        ({"cpu_offload": True}, {}, "cpu_offload=.*leave it out"),
        ({}, {}, "there is only one"),
    ],
)
def test_unsupported_settings(settings, more, message, sharding):
    refused(message, sharding(settings, **more))


@pytest.mark.parametrize("name", ["optim", "torch_compile", "auto_find_batch_size"])
def test_unsupported_arguments(name, sharding):
    value = {"optim": "adafactor"}.get(name, True)
    args = sharding()
    args.distributed_state.num_processes = 2
    try:
        setattr(args, name, value)
        refused(f"{name}='?{value}'? is not supported with FSDP", args)
    finally:
        args.distributed_state.num_processes = 1


def test_models_that_cannot_be_sharded(sharding):
    scalar = tiny_vit()
    scalar.scale = nn.Parameter(torch.ones(()))
    for model, message in (
        (tiny_resnet(), "BatchNorm .*embedder.*not synchronised"),
        (scalar, "a parameter without dimensions .scale"),
        (headed("wav2vec2"), "LayerDrop.*set the config's layerdrop to 0"),
    ):
        with pytest.raises(OptionError, match=message):
            check_shardable(sharding(), model)
        check_shardable(tiny_arguments(sharding().output_dir), model)
    own = torch.optim.SGD(tiny_vit().parameters())
    with pytest.raises(OptionError, match="an optimizer of your own"):
        check_shardable(sharding(), tiny_vit(), own)


def test_the_launcher_requests_it(tmp_path, monkeypatch):
    """Only FSDP2, with the weights on every process; the command line does not shard."""
    with monkeypatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # validation sets it if it is not set
        asked = ["--use_fsdp", "--fsdp_version=2", "--num_processes=2", "t.py"]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(asked))
    given = tiny_arguments(tmp_path / "out")
    for key, value in prepare_multi_gpu_env(args).items():
        if key.startswith(("ACCELERATE_USE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    refused("cpu_ram_efficient_loading=True.*--fsdp_cpu_ram_efficient_loading false", given)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    refused("there is only one", given)
    with pytest.raises(OptionError, match="accelerate launch --use_fsdp .*FTTrainer"):
        read(["--model", "nobody/nothing", "--dataset", "nobody/nothing"])
