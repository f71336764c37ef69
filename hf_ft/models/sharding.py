"""A model whose parameters are sharded over the processes (FSDP2): each process holds a part of every tensor.

If a model is not sharded, these functions change nothing, so callers need not check.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

# --- the model --------------------------------------------------------------------------------------------


def shard(
    model: nn.Module, device: torch.device, layers: Callable[[nn.Module], bool], dtype: torch.dtype | None = None
) -> None:
    """Shard the parameters of a model in place, with the values of the first process; all processes must call it.

    Args:
        device: where this process computes.
        layers: whether a module's parameters are gathered on their own; all others form one more group.
        dtype: dtype of the gathered parameters, for a model that runs under autocast to it; None for their own.
            Shards, and the sums of gradients over the processes, keep the parameters' own.
    """
    _make_equal(model, device)
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # By default, the outermost group stays whole after a forward pass (pytorch#144289): stages would then freeze, and
    # terms would read, tensors that the optimizer does not know.
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": policy}
    for module in reversed(list(model.modules())[1:]):  # what lies inside first
        if layers(module):
            fully_shard(module, **settings)
    fully_shard(model, **settings)


@torch.no_grad()
def _make_equal(model: nn.Module, device: torch.device) -> None:
    """Synchronise the model, as DDP does when it wraps one: shards of differing models would not fit together."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        sent = tensor.detach().to(device).contiguous()
        torch.distributed.broadcast(sent, src=0)
        tensor.data = sent  # contiguous, as shards are


def refresh(model: nn.Module) -> None:
    """Register which parameters were frozen or unfrozen; all processes must call it.

    Each group chooses the dtype of its gradients' sum by the parameters that train when it is gathered for the first
    time: if there are none, as in a linear probe, training them later fails in bf16 (pytorch#186998).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model before sharding, which derives a new class."""
    kinds: list[Any] = type(model).mro()
    plain: type[nn.Module] = next(kind for kind in kinds if not issubclass(kind, FSDPModule))
    return plain


def parts(model: nn.Module) -> int:
    """The number of processes that share the parameters of a model; 1 if each has all of them."""
    return torch.distributed.get_world_size() if is_sharded(model) else 1


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model; all processes must call it.

    For a sharded model it is gathered in the CPU memory of the first process, and is empty on the others.
    """
    if not is_sharded(model):
        return model.state_dict()
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    own = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    # Tied parameters are gathered once for each name, but must be one tensor, so that they are saved once.
    return {name: state[first.setdefault(id(own[name]), name)] for name in state}


def load_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict of whole tensors, strictly; each process takes its own parts.

    Raises:
        RuntimeError: if names or shapes differ.
    """
    if is_sharded(model):
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=True))
    else:
        model.load_state_dict(state, strict=True)


@torch.no_grad()
def load_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of a model under the same names; each process takes its own parts.

    Raises:
        RuntimeError: if shapes differ.
    """
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise RuntimeError(f"{name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
        like = own[name]
        local(like).copy_(local(_part_of(tensor, like)) if isinstance(like, DTensor) else tensor)


# --- tensors ----------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; gradients flow."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Any:
    """A tensor of all parts; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part_of(tensor: Tensor, like: DTensor) -> Tensor:
    """This process's part of a whole tensor, in memory of its own."""
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).clone()


# --- the optimizer ----------------------------------------------------------------------------------------


def whole_optimizer_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """The state dict of an optimizer with whole tensors in CPU memory, as without sharding; all processes must call it.

    Args:
        keep: whether this process needs it; elsewhere its tensors are not kept.
    """
    state = optimizer.state_dict()

    def gathered(value: Any) -> Any:
        value = whole(value)
        return (value.cpu() if keep else None) if isinstance(value, Tensor) else value

    return {
        **state,
        "state": {i: {name: gathered(value) for name, value in of.items()} for i, of in state["state"].items()},
    }


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict of whole tensors; each process takes its own parts.

    Raises:
        ValueError: if it belongs to other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def placed(index: int, value: Any) -> Any:
        parameter = parameters[index]
        if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or not value.dim():
            return value
        if value.shape != parameter.shape:
            raise ValueError(f"the state of parameter {index} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
        return _part_of(value, parameter)

    placed_state = {i: {name: placed(i, value) for name, value in of.items()} for i, of in state["state"].items()}
    optimizer.load_state_dict({**state, "state": placed_state})
