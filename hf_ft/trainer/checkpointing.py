"""Checkpoints of a Trainer; an interrupted save leaves no partial checkpoint."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils import logging

from hf_ft.core.compose import check_states
from hf_ft.core.config import as_saved, load_configs, write_configs
from hf_ft.core.config_files import read_config_file
from hf_ft.core.context import State
from hf_ft.documents.public import shareable_name, shareable_text
from hf_ft.engine import checkpoint as files
from hf_ft.engine import checkpoint_folders as folders
from hf_ft.engine import deltas
from hf_ft.engine.averaging import RunningAverage, averaged
from hf_ft.errors import CheckpointError, Error, OptionError
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import of_members
from hf_ft.models.hub import base_model_id, loaded_commit
from hf_ft.models.sharding import whole_state
from hf_ft.models.weight_files import member_folder
from hf_ft.processes import process_name
from hf_ft.trainer.model_card import card_of, write_card
from hf_ft.trainer.protocols import ForCheckpoints
from hf_ft.trainer.pushing import push_save

logger = logging.get_logger(__name__)


@contextmanager
def written_whole(final: Path, writer: str, writes: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder that is renamed to ``final`` once every process has written its part.

    If a process is killed before that, nothing is left that a resume could mistake for a checkpoint.

    Args:
        writer: the process in the temporary name; the same for all processes of the run.
        writes: whether this process creates and renames the folder; exactly one process does.
        wait: waits for all processes.
    """
    written = folders.incomplete(final, writer)
    if writes:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
    wait()
    try:
        yield written
    except BaseException:  # such as a full disk
        if writes:
            shutil.rmtree(written, ignore_errors=True)
        raise
    wait()
    if writes:
        folders.seal(written)
        folders.move_into_place(written, final)
    wait()


@contextmanager
def read_from(folder: str | Path, names: str) -> Iterator[None]:
    """Name the files of a checkpoint in place of what the Trainer and torch raise about their content.

    Raises:
        CheckpointError: in place of their errors.
    """
    try:
        yield
    except (Error, torch.OutOfMemoryError):
        raise
    except (pickle.UnpicklingError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{names} in {folder} cannot be loaded ({type(error).__name__}: {reason}). Restore them, or use another "
            "checkpoint."
        ) from error


class Checkpoints:
    """Saves and loads the trained weights and the state that belongs to them.

    Checkpoints of an earlier run are never mixed with new ones, and never deleted without permission.

    Attributes:
        base_name: Hub id or folder of the base model.
        base_revision: its commit on the Hub.
        base: hash of each tensor at the start of training; empty before that.
        writer: name of the process of the run's first rank.
    """

    def __init__(self, trainer: ForCheckpoints) -> None:
        self._trainer = trainer
        self._written: set[str] = set()
        self.base_name = _base_name(trainer.model)
        self.base_revision = _base_revision(trainer.model, self.base_name)
        self.base: dict[str, str] = {}
        self.writer = process_name()

    # --- saving --------------------------------------------------------------------------------------------

    def save(self, trial: Any) -> None:
        """Like ``Trainer``, but write to a temporary folder and rename it when complete."""
        trainer, args, state = self._trainer, self._trainer.args, self._trainer.state
        if trainer.hp_search_backend is None and trial is None:
            trainer.store_flos()
        run_dir = Path(trainer._get_output_dir(trial))
        final = run_dir / f"checkpoint-{state.global_step}"
        with written_whole(final, self.writer, args.should_save, trainer.accelerator.wait_for_everyone) as folder:
            trainer.save_model(str(folder), _internal_call=True)
            if not args.save_only_model:
                trainer._save_optimizer_and_scheduler(str(folder))
                trainer._save_scaler(str(folder))
                trainer._save_rng_state(str(folder))
            best = state.best_global_step
            if best and (best == state.global_step or (run_dir / f"checkpoint-{best}").exists()):
                state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")
            if args.should_save:
                self._store_callback_states()
                state.save_to_json(str(folder / folders.TRAINER_STATE))
        self._written.add(final.name)
        if args.push_to_hub and args.hub_strategy != HubStrategy.END:
            push_save(trainer, final)
        self.rotate(run_dir)

    def rotate(self, run_dir: Path) -> None:
        """Delete the oldest checkpoints beyond ``save_total_limit``."""
        args, best = self._trainer.args, self._trainer.state.best_global_step
        if args.should_save and args.save_strategy != "no":
            best_folder = run_dir / f"checkpoint-{best}"
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=str(best_folder) if best and best_folder.exists() else None,
            )

    def _store_callback_states(self) -> None:
        # As in Trainer._save_checkpoint.
        stored: Any = self._trainer.state.stateful_callbacks
        for callback in [*self._trainer.callback_handler.callbacks, self._trainer.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(stored.get(name), list):
                    stored[name].append(state)
                else:
                    stored[name] = state

    def save_beside_weights(self, folder: Path) -> None:
        """Save what belongs with the weights: strategies, their measurements, and modules used only in training."""
        trainer = self._trainer
        self.save_arguments(folder)
        write_configs(folder, trainer.configs, base_model=self._description())
        files.write_states(folder, {c.ft_type: trainer.states.get(c.ft_type, State()) for c in trainer.configs})
        modules = self._term_modules()
        if modules and trainer.is_in_train:  # modules used only in training are not part of the final model
            save_file(files.unshared(modules.state_dict()), folder / files.MODULES_NAME)
        average = self._average()
        if average is not None and average.begun and not trainer.args.save_only_model:
            tensors = {name: tensor.contiguous().cpu() for name, tensor in average.state_dict().items()}
            save_file(tensors, folder / files.LIVE_NAME)
        if isinstance(trainer.model, CollaborativeModel) and trainer.processing_class is not None:
            own = of_members(trainer.processing_class, trainer.model.config.inputs)
            for index, processor in enumerate(own):  # so that each member can be used alone
                processor.save_pretrained(folder / member_folder(index))
        if isinstance(trainer.model, PeftModel):
            files.save_buffers(trainer.model, folder)
            files.save_base_config(trainer.model, folder)
            if trainer.args.push_to_hub and self.base_name and base_model_id(self.base_name) is None:
                logger.warning_once(
                    f"the base model of the adapter is a local folder, {self.base_name!r}: the upload refers to it "
                    f"only as {self._shared_name()!r}. Upload the base model too, and write its id into "
                    "adapter_config.json on the Hub."
                )

    def save_arguments(self, folder: Path) -> None:
        """Rewrite ``training_args.bin`` in a form that can be shared: the Trainer's holds the token and local paths."""
        args = copy.copy(self._trainer.args)
        args.hub_token = None
        for name, value in vars(args).items():
            if isinstance(value, str):
                setattr(args, name, shareable_text(value))
        torch.save(args, folder / TRAINING_ARGS_NAME)

    def save_delta(self, path: str | Path, name: str = "", **about: Any) -> None:
        """Save only what training changed, with the processor and a card.

        Args:
            name: what the card calls it; default: the name of the folder.
            about: arguments of the card.
        """
        if not self.base:
            raise CheckpointError("save_delta: nothing has been trained yet; call train() first.")
        trainer, base = self._trainer, (self._shared_name(), self.base_revision)
        with averaged(self._average()):
            state = whole_state(trainer.model)  # by all processes
            if not trainer.args.should_save:
                return
            with folders.files_written_whole(Path(path)) as written:
                deltas.save_delta(trainer.model, written, self.base, trainer.configs, *base, state=state)
                if trainer.processing_class is not None:
                    trainer.processing_class.save_pretrained(written)
                write_card(card_of(trainer, self.base_name, Path(path), name, delta=True, **about), written)

    # --- loading -------------------------------------------------------------------------------------------

    def load(self, folder: str | Path, to_resume: bool = False) -> None:
        """Load the weights of the model and of the terms' modules; the model's weights may be an average.

        Args:
            to_resume: whether training continues, from the live weights and their average.
        """
        files.load_weights(self._trainer.model, folder)
        modules, average = self._term_modules(), self._average()
        if modules:
            modules.load_state_dict(files.checked(Path(folder) / files.MODULES_NAME)[0])
        if average is not None and to_resume:
            average.begin()
            average.load_state_dict(files.checked(Path(folder) / files.LIVE_NAME)[0])
        elif average is not None:
            average.forget()

    def states(self, folder: Path) -> dict[str, State]:
        """The measured states saved in a checkpoint, checked against the model before its surgery.

        Raises:
            CheckpointError: if one is missing, damaged, or of another model.
        """
        states = files.read_states(folder)
        try:
            check_states(self._trainer.configs, self._trainer.model, states)
        except OptionError as error:
            raise CheckpointError(f"{folder / files.STATE_NAME}: {error}") from error
        return states

    def resume_folder(self, resume: str | bool | None, folder: Path) -> Path | None:
        """The checkpoint to resume from; None for a fresh start.

        Raises:
            OptionError: if the checkpoint belongs to another strategy.
            CheckpointError: if it is incomplete or damaged, or if there is no complete checkpoint.
        """
        if not resume:
            return None
        chosen = folders.last_checkpoint(folder) if resume is True else Path(resume)
        if resume is not True:
            folders.check_complete(chosen)
        content, configs = read_config_file(chosen), self._trainer.configs
        if tuple(map(as_saved, load_configs(chosen))) != tuple(map(as_saved, configs)):
            raise OptionError(
                f"{chosen} was trained with {[c['ft_type'] for c in content['strategies']]} ({content['strategies']}), "
                f"but this trainer has {[c.shareable() for c in configs]}: resume with the same strategy and "
                "options, or start over in another output_dir."
            )
        return chosen

    def clear(self, folder: Path) -> None:
        """Refuse to mix with the checkpoints of an earlier run, or delete them if that is allowed."""
        earlier = [path for path in folders.checkpoints(folder) if path.name not in self._written]
        if earlier and not self._trainer.overwrite:
            raise OptionError(
                f"output_dir={str(folder)!r} contains {earlier[-1].name} from an earlier run. Continue it with "
                "train(resume_from_checkpoint=True), choose another output_dir, or pass overwrite=True."
            )
        self._trainer.accelerator.wait_for_everyone()
        if self._trainer.args.should_save:
            for path in folders.checkpoints(folder):
                shutil.rmtree(path)

    # --- the start -----------------------------------------------------------------------------------------

    def note_base(self) -> None:
        """Record the current weights of the model as the start of training."""
        self.base = files.digests(self._trainer.model)

    def check_base(self, resume: Path) -> None:
        """Refuse a checkpoint trained from other initial weights, for strategies that refer to the initial weights."""
        saved = read_config_file(resume).get("base_model", {}).get("sha256")
        if saved and saved != self._description()["sha256"]:
            raise CheckpointError(
                f"{resume} was trained from weights other than the model's current ones, and "
                f"{self._trainer.configs[-1].ft_type} compares with the start: create the trainer with the same "
                "pretrained model, not with the checkpoint."
            )

    def _description(self) -> dict[str, Any]:
        run = self._trainer._run
        head = tuple(name for chain in (run.chains if run else ()) for name in chain.parts[-1].modules)
        digest = deltas.base_digest(self.base, head) if self.base else None
        return {"name": self._shared_name(), "revision": self.base_revision, "sha256": digest}

    def _shared_name(self) -> str | None:
        return None if self.base_name is None else shareable_name(self.base_name)

    def _term_modules(self) -> nn.ModuleDict:
        run = self._trainer._run
        return run.plan.term_modules if run is not None else nn.ModuleDict()

    def _average(self) -> RunningAverage | None:
        return None if self._trainer._run is None else self._trainer._run.average


def _base_name(model: nn.Module) -> str | None:
    if isinstance(model, PeftModel):
        return next(iter(model.peft_config.values())).base_model_name_or_path
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _base_revision(model: nn.Module, name: str | None) -> str | None:
    # Since 5.24, Transformers does not keep the commit; without it, use the one that the default branch then had.
    known = getattr(getattr(model, "config", None), "_commit_hash", None)
    return known or (None if name is None else loaded_commit(name))
