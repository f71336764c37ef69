"""Steps of the strategies on a device that does not exist: `python -m tests.gpu.steps [NAME ...]`, without a GPU.

No step may mix tensors of two devices, wait for a value, or copy from the host: see `tests/gpu/absent_device.py`. It
runs in its own process, because torch can register such a device only once.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from docs.tools.tables import documented
from hf_ft.core.compose import resolve
from hf_ft.core.config import FTConfig
from hf_ft.engine.set_up import check, start
from hf_ft.models.find_layouts import look_at
from hf_ft.models.layouts import Layouts
from hf_ft.testing import suited, tiny_inputs
from hf_ft.testing.laws import Maker, _states
from hf_ft.testing.training import equipped, tiny_batch
from tests.gpu import absent_device
from tests.testing.test_laws import OPTIONS, in_turn

STEPS = 2  # in each stage; the first step may copy what a term keeps
# Their steps are those of the strategies they choose, or of plain networks.
LEFT_OUT = ("auto", "amcf", "blockwise")


def take_steps(config: FTConfig, make: Maker, folder: Path) -> None:
    """Take steps in each stage: measure, plan and inspect on the CPU, then set up and run on the device."""
    absent_device.device()  # before the first backward pass, when torch counts the devices for which it needs threads
    model, configs = equipped(make(), config), resolve(config)
    states = _states(config, model, folder)
    plan = check(configs, model, states, tuple(name for name, _ in model.named_parameters()))
    layouts = Layouts()
    look_at(layouts, model, [layer for term in plan.terms for layer in term.layers], tiny_inputs(model))
    with absent_device.there() as copies:
        run = start(configs, model.to(absent_device.device()), plan, states)
        objective = run.objective()
        objective.to(absent_device.device())
        run.layouts.add(layouts._by_layer)
        for stage in plan.stages:
            objective.enter(stage)
            objective.train()
            parameters = [p for p in objective.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            for step in range(STEPS):
                batch = absent_device.moved(tiny_batch(objective))
                copies.refused = step > 0
                objective(**batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                copies.refused = False


def failures(names: list[str]) -> Iterator[tuple[str, str]]:
    """The strategies whose steps fail there, and why."""
    for name, make in in_turn():
        if name in LEFT_OUT or (names and name not in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                take_steps(suited(documented()[name](**OPTIONS.get(name, {})), make()), make, Path(folder))
            except Exception as error:
                yield name, described(error)


def described(error: Exception) -> str:
    own: list[Any] = [f for f in traceback.extract_tb(error.__traceback__) if "hf_ft" in f.filename]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{where}"


def main() -> int:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = dict(failures(sys.argv[1:]))
    for name, reason in found.items():
        print(f"{name}: {reason}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
