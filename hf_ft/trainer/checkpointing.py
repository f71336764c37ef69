"""Checkpoints of a Trainer that are whole or not there at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, rotate_checkpoints

from hf_ft.core.config import FTConfig, load_configs
from hf_ft.core.config_files import read_config_file
from hf_ft.engine import checkpoint as files
from hf_ft.errors import OptionError
from hf_ft.models.weight_files import member_folder


def _base_name(model: nn.Module) -> str | None:
    if isinstance(model, PeftModel):
        return next(iter(model.peft_config.values())).base_model_name_or_path
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


class WholeCheckpoints:
    """Mixin for a Trainer: a checkpoint is written under another name and renamed when it is whole.

    A process killed while it saves leaves nothing that a resume could take for a checkpoint, and an earlier
    run's checkpoints are neither mixed with nor lost.
    """

    configs: tuple[FTConfig, ...]
    overwrite: bool
    # The Trainer's own.
    args: Any
    state: Any
    accelerator: Any
    control: Any
    callback_handler: Any
    hp_search_backend: Any
    _get_output_dir: Any
    save_model: Any
    store_flos: Any
    _save_optimizer_and_scheduler: Any
    _save_scaler: Any
    _save_rng_state: Any
    _push_from_checkpoint: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._written: set[str] = set()
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but written under another name and renamed when whole."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        written = run_dir / f"{files.INCOMPLETE}{final.name}"
        if self.args.should_save:
            shutil.rmtree(written, ignore_errors=True)
            written.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(written), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(written))
            self._save_scaler(str(written))
            self._save_rng_state(str(written))
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run_dir / f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        if self.args.should_save:
            self._store_callback_states()
            self.state.save_to_json(str(written / files.TRAINER_STATE))
            files.move_into_place(written, final)
            self._written.add(final.name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            if self.args.should_save:  # the Trainer takes files alone from the checkpoint, and members have folders
                for member in final.glob(member_folder("*")):
                    shutil.copytree(member, run_dir / member.name, dirs_exist_ok=True)
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best_folder = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=best_folder,
            )

    def _store_callback_states(self) -> None:
        # As in Trainer._save_checkpoint.
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                stored = self.state.stateful_callbacks
                if isinstance(stored.get(name), list):
                    stored[name].append(state)
                else:
                    stored[name] = state

    def _resume_folder(self, resume: str | bool | None, folder: Path) -> Path | None:
        if not resume:
            return None
        chosen = files.last_checkpoint(folder) if resume is True else Path(resume)
        content = read_config_file(chosen)
        saved = load_configs(chosen)
        if saved != self.configs:
            raise OptionError(
                f"{chosen} was trained with {[c['ft_type'] for c in content['strategies']]} "
                f"({content['strategies']}), this trainer has {[c.to_dict() for c in self.configs]}: resume with the "
                "same strategy and options, or start anew in another output_dir."
            )
        files.read_states(chosen)
        return chosen

    def _clear(self, folder: Path) -> None:
        """Refuse to mix with an earlier run's checkpoints, or delete them where that was allowed."""
        earlier = [path for path in files.checkpoints(folder) if path.name not in self._written]
        if earlier and not self.overwrite:
            raise OptionError(
                f"output_dir={str(folder)!r} holds {earlier[-1].name} of an earlier run. Go on with "
                "train(resume_from_checkpoint=True), choose another output_dir, or pass overwrite=True."
            )
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in files.checkpoints(folder):
                shutil.rmtree(path)
            files.remove_incomplete(folder)
