"""The one Trainer: it interprets a plan, and otherwise is ``transformers.Trainer``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_ft.core.compose import resolve
from hf_ft.core.config import FTConfig, write_configs
from hf_ft.core.config_files import read_config_file
from hf_ft.core.context import Context, FrozenCache, State
from hf_ft.core.plan import Plan, stage_borders, stage_index
from hf_ft.core.task_loss import TaskLoss
from hf_ft.data.prepare import collate
from hf_ft.engine import checkpoint as files
from hf_ft.engine.batch import _users
from hf_ft.engine.objective import Objective
from hf_ft.engine.param_groups import STAGE_RATES, split_groups, stage_scheduler, term_groups
from hf_ft.engine.run import Run, check, check_members, set_up
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import unwrap
from hf_ft.models.ensemble.processor import CollaborativeTokenizer
from hf_ft.models.names import covers
from hf_ft.models.norms import norm_layers
from hf_ft.trainer.checkpointing import WholeCheckpoints, _base_name
from hf_ft.trainer.checks import (
    check_arguments,
    check_labels,
    check_last_batch,
    class_weights_of,
    warn_recommended,
    warn_slow_statistics,
)
from hf_ft.trainer.context import _curve, measuring_context
from hf_ft.trainer.loss_log import _TermLog
from hf_ft.trainer.model_card import WritesCard, write_card
from hf_ft.trainer.source_streams import StreamedSteps
from hf_ft.trainer.stage_cache import CachedStages

logger = logging.get_logger(__name__)
ClassWeights = Sequence[float] | Tensor | Literal["balanced"]


class FTTrainer(StreamedSteps, WholeCheckpoints, CachedStages, WritesCard, Trainer):
    """``transformers.Trainer`` with a fine-tuning strategy.

    All stages of a strategy run in one ``train()``: one global step, one log, one set of checkpoints, one best
    model. ``eval_loss`` is the task's loss alone; each summand of the training loss is logged as
    ``loss/<name>``. Losses are micro-batch means, so that gradient accumulation and ranks do not change them.

    Args:
        model: as ``Trainer`` takes it.
        args: likewise.
        *positional: likewise.
        strategy: a config, a registered name such as ``"lp_ft"``, or a list of them.
        class_weights: a weight per class of the cross-entropy, or ``"balanced"``: n / (C * n_c) over the
            training labels.
        overwrite: whether checkpoints of an earlier run in ``args.output_dir`` may be deleted.
        frozen_cache: whether a stage that trains only what follows a frozen part computes that part once instead
            of in every step: ``"auto"``, ``"always"``, ``"never"``, or a :class:`~hf_ft.core.context.FrozenCache`.
        plain_train_dataset: the training samples without augmentation, in the same order, for strategies that
            search or measure on them; default: ``train_dataset``.
        source_dataset: the data of the pretraining, or other data, for strategies that train on it beside the target's:
            processed as they are, map-style or iterable, with labels of the source head's classes.
        source_data_collator: makes batches of them; default: ``data_collator``.
        states: what the strategies measured before (``trainer.states`` of another run on the same model, data and
            options), so that trials of other rates need not measure again.
        **keywords: all else that ``Trainer`` takes.

    Raises:
        OptionError: a value, or a combination with ``args``, that cannot work.
    """

    # Losses are means over a micro-batch, which the Trainer then divides by the accumulation steps.
    loss_is_scaled_for_ga = False
    model: Any
    optimizer: Any
    lr_scheduler: Any
    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        strategy: FTConfig | str | Iterable[FTConfig | str] = "full",
        class_weights: ClassWeights | None = None,
        overwrite: bool = False,
        frozen_cache: FrozenCache | Literal["auto", "always", "never"] = "auto",
        plain_train_dataset: Any = None,
        source_dataset: Any = None,
        source_data_collator: Callable[[list[Any]], Any] | None = None,
        states: Mapping[str, State] | None = None,
        **keywords: Any,
    ) -> None:
        self.configs = resolve(strategy)
        self.overwrite = overwrite
        self.frozen_cache = frozen_cache if isinstance(frozen_cache, FrozenCache) else FrozenCache(use=frozen_cache)
        self.source_dataset, self.source_data_collator = source_dataset, source_data_collator
        args = args or TrainingArguments("tmp_trainer")
        if isinstance(keywords.get("processing_class"), CollaborativeTokenizer) and not positional:
            keywords.setdefault("data_collator", collate(keywords["processing_class"]))  # as the Trainer pads for one
        check_arguments(args, self.configs)
        self._check_source()
        if model is not None:  # before the Trainer makes its output folder
            given = inspect.signature(Trainer.__init__).bind_partial(self, model, args, *positional, **keywords)
            check_labels(given.arguments.get("train_dataset"), model)
            self._early_checks(model, args, given.arguments.get("optimizers", (None, None))[1])
        super().__init__(model, args, *positional, **keywords)
        if model is None:
            check_labels(self.train_dataset, self.model)
            self._early_checks(self.model, args, self.lr_scheduler)
        # Both are the task loss's: were they left here, the Trainer would count items and scale again.
        function, self.compute_loss_func = self.compute_loss_func, None
        self.model_accepts_loss_kwargs = False
        # Older Trainers let accelerate divide by the accumulation steps as well: once is enough.
        self.accelerator.gradient_accumulation_steps = 1
        weights = class_weights_of(class_weights, self.train_dataset, self.model, function, self.label_smoother)
        self.task_loss = TaskLoss(self.label_smoother, weights, function)
        self.plain_train_dataset = plain_train_dataset
        self._known_states = dict(states or {})
        self._run: Run | None = None
        self._finished = False
        self._resuming: Path | None = None
        self._objective: Objective | None = None
        self._borders: tuple[int, ...] = ()
        self._stage = 0
        self._logged = _TermLog()
        self._zeros_told: set[str] = set()
        self._users_optimizer = self.optimizer
        self._base_name = _base_name(self.model)
        self._base: dict[str, str] = {}
        warn_recommended(self.configs, args)
        # First in the list: stages change, and the model is finalised, before any other callback looks.
        self.callback_handler.callbacks.insert(0, _Stages(self))

    # --- the run -------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train through all stages; see ``Trainer.train``.

        With ``resume_from_checkpoint=True`` the newest whole checkpoint is taken, and its stage with it. A further
        call trains on from the present weights, as a run of its own whose checkpoints replace those of the last.

        Raises:
            OptionError: checkpoints of an earlier run are in the way; resumed with another strategy.
            CheckpointError: nothing whole to resume from, or from another starting point.
        """
        folder = Path(self._get_output_dir(trial))
        resume = self._resume_folder(resume_from_checkpoint, folder)
        if resume is None and self.args.save_strategy != "no":
            self._clear(folder)
        self._resuming = resume
        try:
            return super().train(str(resume) if resume else None, trial, ignore_keys_for_eval, **kwargs)
        finally:
            self._resuming = None
            self._forget_recorded()
            self._close_streams()
            if self._run is not None:
                self._run.thaw()

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        run = self._start_run()
        if self._users_optimizer is None:
            self.optimizer = None  # its groups and flags are those of an earlier run, or of larger batches
        # Anew for every attempt: accelerate patches the forward of what it prepares.
        self._objective = run.objective(self.task_loss)
        self._logged = _TermLog()
        self._begin_streams(run.plan, batch_size or self._train_batch_size)
        check_last_batch(self, self._objective)
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _start_run(self) -> Run:
        """Measure, plan and apply surgery, once per model."""
        if self._run is not None and self._run.model is self.model and not self._finished:
            self._run.thaw()
            return self._run
        self._finished = False
        self._base = files.digests(self.model)
        self._run = set_up(self.model, self.configs, states=self._states())
        if self._run.model is not self.model:
            self.model = self.model_wrapped = self._run.model
        if self._resuming is not None and (self._run.anchors or self._run.reference):
            self._check_start(self._resuming)
        return self._run

    def _states(self) -> dict[str, State]:
        """What the strategies measured: read from the checkpoint, or measured and sent from rank 0 to all."""
        if self._resuming is not None:
            return files.read_states(self._resuming)
        states = {}
        for config in self.configs:
            if config.ft_type in self._known_states:
                states[config.ft_type] = self._known_states[config.ft_type]
            elif config.measures():
                states[config.ft_type] = config.measure(self.model, self.context())
        return broadcast_object_list([states])[0] if self.args.world_size > 1 else states

    @property
    def states(self) -> Mapping[str, State]:
        """What the strategies measured, by name; empty before training."""
        return self._run.states if self._run is not None else {}

    def measure(self) -> Mapping[str, State]:
        """Let the strategies look at the data now, instead of when training begins; what they measured."""
        return self._start_run().states

    def context(self) -> Context:
        """What a strategy may use to look at the data: samples, and how they are trained on."""
        return measuring_context(self)

    def _finish_run(self) -> None:
        assert self._run is not None
        self.model = self.callback_handler.model = self._run.finish()
        self._finished = bool(self._run.plan.finalise)  # the model is another one now: a further train() starts anew

    # --- what the Trainer asks for -------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Hand the Trainer the objective in the model's place. ``self.model`` stays the user's."""
        if training:
            run = self._start_run()
            if self.args.ddp_find_unused_parameters is None and self.accelerator.ddp_handler is not None:
                # Parameters that only a later stage trains get no gradient until then, nor those of a term that is at
                # 0 or left out.
                assert self._objective is not None
                counting, trained = self._objective.terms, [t for t in run.plan.terms if isinstance(t.fn, nn.Module)]
                idle = len(run.plan.stages) > 1
                idle |= any(term.schedule is not None or term not in counting for term in trained)
                self.accelerator.ddp_handler.find_unused_parameters |= idle
            return self.accelerator.prepare_model(self._objective)
        if self._objective is None or self._objective.model is not self.model:
            self._objective = Objective(self.model, Plan(), task_loss=self.task_loss)
            self.accelerator.prepare_model(self._objective, evaluation_mode=True)
        return self._objective

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer over all that is ever trained, its groups split by stage and rate."""
        run = self._start_run()
        trained = set(run.trained)
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(name in trained)
        super().create_optimizer(run.model)
        assert self.optimizer is not None
        groups = split_groups(self.optimizer.param_groups, run.model, run.plan, run.trainable)
        held = {id(parameter) for group in groups for parameter in group["params"]}
        missing = [n for n, p in run.model.named_parameters() if n in trained and id(p) not in held]
        if missing:
            raise OptionError(
                f"the optimizer ({type(self.optimizer).__name__}) does not hold {len(missing)} of the parameters "
                f"that the strategy trains, such as {missing[0]!r}: choose another optim, or pass all parameters."
            )
        # In place: whoever holds the list (a wrapper of the optimizer) keeps seeing it.
        self.optimizer.param_groups[:] = groups
        extra = term_groups(run.plan, self.args.learning_rate, self.args.weight_decay)
        for group in extra if self._users_optimizer is None else ():
            self.optimizer.add_param_group(group)
        if extra and self._users_optimizer is not None:
            names = ", ".join(self._term_modules())
            logger.warning(
                f"optimizers: yours does not hold what {names} would train beside the model; it stays as is."
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The Trainer's scheduler; with several stages, one that runs its schedule once in each."""
        stages = self._start_run().plan.stages
        self._borders = stage_borders(stages, num_training_steps)
        warn_slow_statistics(self.model, self._start_run().trained, num_training_steps)
        if len(stages) == 1:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = stage_scheduler(optimizer or self.optimizer, self._borders, partial(_curve, self.args))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's, without normalisation layers, which it tells by names that many models do not use."""
        norms = [name for name, _ in norm_layers(model)]
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not any(covers(norm, name) for norm in norms)]

    def _set_signature_columns_if_needed(self) -> None:
        """As the Trainer's, with the tensors that a model of several members reads under numbered names."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns = list(dict.fromkeys([*columns, *getattr(unwrap(self.model)[0], "input_names", ())]))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._trained_alone(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._trained_alone(model), grad_norm)

    def _trained_alone(self, model: nn.Module) -> Any:
        """What stands in for the model where its gradients are asked for: going through all modules is slow."""
        return model if self._objective is None else _Parameters(self._objective.trained)

    def _get_learning_rate(self) -> float:
        """The rate of the first parameter group that trains at present: the backbone's where it does."""
        groups = getattr(self.optimizer, "param_groups", [])
        for group in groups:
            if STAGE_RATES in group and group[STAGE_RATES][self._stage]:
                return float(group["lr"]) if len(groups) > 1 else super()._get_learning_rate()
        return super()._get_learning_rate()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss: task and terms in training, the task alone in evaluation."""
        outputs = model(**self._with_streams(self._in_present_form(inputs)))
        if outputs.get("loss") is None:
            raise ValueError(
                f"the model returned no loss, only {sorted(outputs)}, for the inputs {sorted(_users(inputs))}. "
                "Is there a column of labels in the data set (see args.label_names)?"
            )
        self._logged.add(outputs.pop("terms", None))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            terms = self._logged.drain(self.accelerator)
            logs.update(terms)
            self._warn_of_zeros(terms)
            if self._run is not None and len(self._run.plan.stages) > 1:
                logs["stage"] = self._stage
        super().log(logs, start_time)

    def _warn_of_zeros(self, logged: dict[str, float]) -> None:
        """A term that is exactly 0 may have nothing to work on: told where values are read anyway, at a log."""
        for term in self._run.plan.terms if self._run is not None else ():
            if term.zero_means and logged.get(f"loss/{term.name}") == 0.0 and term.name not in self._zeros_told:
                self._zeros_told.add(term.name)
                logger.warning(f"loss/{term.name} was exactly 0 since the last log: {term.zero_means}.")

    def _enter_stage(self, step: int, force: bool = False) -> None:
        """Make the run be where this optimizer step (from 0) belongs."""
        assert self._objective is not None and self._run is not None
        self._objective.progress = step / self._borders[-1]
        index = stage_index(self._borders, step)
        if force or index != self._stage:
            self._stage = index
            self._objective.enter(self._run.plan.stages[index])
            self._start_from_recorded(self._borders[index] - step)
        self._leave_out_unused()

    # --- saving and loading --------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        write_configs(folder, self.configs, base_model=self._base_description())
        files.write_states(folder, {c.ft_type: self.states.get(c.ft_type, State()) for c in self.configs})
        modules = nn.ModuleDict(self._term_modules())
        if modules and self.is_in_train:  # what is only for training is not in its result
            save_file(
                {k: v.contiguous().cpu() for k, v in modules.state_dict().items()},
                folder / files.MODULES_NAME,
            )
        if isinstance(self.model, PeftModel):
            files.save_buffers(self.model, folder)
        write_card(self._card(folder.name, folder=folder), folder)

    def save_delta(self, path: str | Path) -> None:
        """Write only the tensors and buffers that training changed; :func:`hf_ft.load_delta` puts them back.

        Raises:
            CheckpointError: before training, or for a model that has no delta.
        """
        if not self._base:
            raise files.CheckpointError("save_delta: nothing was trained yet; call train() first.")
        if self.args.should_save:
            files.save_delta(self.model, path, self._base, self.configs, self._base_name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._start_run()  # what terms pull back to is the start, not the checkpoint
        self._load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        self._load(str(best))

    def _load(self, folder: str) -> None:
        files.load_weights(self.model, folder)
        modules = nn.ModuleDict(self._term_modules())
        if modules:
            modules.load_state_dict(files.checked(Path(folder) / files.MODULES_NAME)[0])

    def _check_start(self, resume: Path) -> None:
        saved = read_config_file(resume).get("base_model", {}).get("sha256")
        if saved and saved != self._base_description()["sha256"]:
            raise files.CheckpointError(
                f"{resume} was trained from other weights than the model has now, and {self.configs[-1].ft_type} "
                "compares with the start: make the trainer with the same pretrained model, not with the checkpoint."
            )

    # --- small things --------------------------------------------------------------------------------------

    def _early_checks(self, model: nn.Module, args: TrainingArguments, scheduler: Any) -> None:
        """Tell in ``__init__`` whatever can be told without looking at the data."""
        check_members(self.configs, model)
        if any(config.measures() for config in self.configs):  # there is no plan yet
            for config in self.configs:
                config.check_model(model)
            return
        trainable = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        plan = check(self.configs, model, {}, trainable)
        for stream in plan.streams:
            stream.batch_size(args.per_device_train_batch_size)
            if stream.prepare is not None:
                stream.prepare(self._data_of(stream))
        if len(plan.stages) == 1:
            return
        if scheduler is not None:
            raise OptionError(
                f"optimizers: a scheduler of your own cannot follow the {len(plan.stages)} stages of "
                f"{plan.owner!r}; pass (optimizer, None) and choose args.lr_scheduler_type."
            )
        _curve(args, 10)  # raises where the schedule cannot run once per stage

    def _term_modules(self) -> dict[str, nn.Module]:
        terms = self._run.plan.terms if self._run is not None else ()
        return {term.name: term.fn for term in terms if isinstance(term.fn, nn.Module)}

    def _base_description(self) -> dict[str, Any]:
        chains = self._run.chains if self._run is not None else ()
        head = tuple(name for chain in chains for name in chain.parts[-1].modules)
        sha256 = files.base_digest(self._base, head) if self._base else None
        return {"name": self._base_name, "sha256": sha256}


class _Stages(TrainerCallback):
    """Moves the run through its stages."""

    def __init__(self, trainer: FTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._enter_stage(state.global_step, force=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._enter_stage(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._finish_run()


@dataclass(frozen=True)
class _Parameters:
    """Has parameters, as a model has."""

    trained: list[nn.Parameter]

    def parameters(self) -> list[nn.Parameter]:
        return self.trained
