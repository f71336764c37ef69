"""A device that does not exist: tensors on it have shapes but no values.

Mixing them with CPU tensors, reading their values, or copying to them fails, where it would fail or wait on a GPU, so
that steps can be checked for this without a GPU. Torch runs operations on such tensors by their shapes alone
(``FakeTensorMode``); the device is the one reserved for third-party backends (``PrivateUse1``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NAME = "absent"


@functools.cache
def device() -> torch.device:
    """The device, registered at the first call."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # missing in old versions

    module = SimpleNamespace(
        is_available=lambda: False,  # only what requests it should compute there
        device_count=lambda: 1,
        current_device=lambda: 0,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    _setup_privateuseone_for_python_backend(NAME, module)
    return torch.device(NAME, 0)


class Copies(TorchFunctionMode):
    """Lets CPU tensors be copied to the device, until ``refused``."""

    refused = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.to and args[0].device.type == "cpu":
            wanted = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device | str | Tensor)]
            target = next((x.device if isinstance(x, Tensor) else torch.device(x) for x in wanted), None)
            if target is not None and target.type == NAME:
                if self.refused:
                    raise RuntimeError("a copy to the device within a step")
                dtype = next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)), args[0].dtype)
                return torch.empty_like(args[0], device=target, dtype=dtype)
        return function(*args, **kwargs)


@contextmanager
def there() -> Iterator[Copies]:
    """Within this context, new tensors have no values, and modules can be moved to the device."""
    device()
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies, mock.patch.object(nn.Module, "to", _to):
        yield copies


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Like ``nn.Module.to``, which cannot replace parameters by ones without values."""
    wanted, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    made: dict[int, Tensor] = {}
    for inner in module.modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    of_type = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                    same = of_type == tensor.dtype and tensor.device.type == (wanted or tensor.device).type
                    new = tensor if same else torch.empty(tensor.shape, dtype=of_type, device=wanted or tensor.device)
                    parameter = isinstance(tensor, nn.Parameter) and not same
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                if tensor is not None:
                    tensors[name] = made[id(tensor)]
    return module


def moved(value: Any) -> Any:
    """The tensors of a nested structure, moved to the device."""
    return tree_map(lambda leaf: leaf.to(device()) if isinstance(leaf, Tensor) else leaf, value)
