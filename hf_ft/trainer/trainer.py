"""The Trainer: ``transformers.Trainer`` that runs the plan of a strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_ft.core.compose import resolve
from hf_ft.core.config import BASELINE, FTConfig
from hf_ft.core.config_files import CONFIG_NAME
from hf_ft.core.context import Context, FrozenCache, State
from hf_ft.core.plan import Plan, stage_borders
from hf_ft.core.task_loss import TaskLoss
from hf_ft.data.groups import given_groups
from hf_ft.data.mixing import Mixing
from hf_ft.data.prepare import collate
from hf_ft.data.streams import is_map_style
from hf_ft.engine.averaging import averaged
from hf_ft.engine.batch import fills_up, leading, own_rows, rows_of, starts_at_borders
from hf_ft.engine.checkpoint_folders import files_written_whole, remove_replaced
from hf_ft.engine.objective import Objective
from hf_ft.engine.param_groups import (
    STAGE_RATES,
    check_settings,
    regroup,
    settings,
    stage_scheduler,
    term_groups,
    undecayed_names,
)
from hf_ft.engine.run import Run
from hf_ft.engine.set_up import measure, set_up
from hf_ft.errors import accepted
from hf_ft.models.anatomy import unwrap
from hf_ft.models.ensemble.processor import CollaborativeTokenizer
from hf_ft.models.preserve import precision_kept
from hf_ft.models.sharding import is_sharded, whole, whole_state
from hf_ft.models.sharing import push_to_hub
from hf_ft.trainer import checks, mixing_checks, sharding, stream_checks, trackers
from hf_ft.trainer.attempt import Attempt, StageBorders
from hf_ft.trainer.checkpointing import Checkpoints, read_from
from hf_ft.trainer.context import curve, looking, measuring_context
from hf_ft.trainer.look import measurable
from hf_ft.trainer.model_card import card_of, write_card
from hf_ft.trainer.patience import stopped_early
from hf_ft.trainer.pushing import DELTA_FOLDER, create_repository, push_result, refused_repository
from hf_ft.trainer.run_lock import alone_in
from hf_ft.trainer.selection import select
from hf_ft.trainer.training_batches import TrainingBatches, ordered_by_epoch

logger = logging.get_logger(__name__)
ClassWeights = Sequence[float] | Tensor | Literal["balanced"]


class FTTrainer(Trainer):
    """``transformers.Trainer`` with a fine-tuning strategy.

    All stages of a strategy run in one ``train()`` call, with one step count, one log, one set of checkpoints and one
    best model. ``eval_loss`` is the task loss alone; each term of the training loss is logged as ``loss/<name>``.
    Losses are means over the rows of an update, so they do not depend on gradient accumulation or the number of ranks.

    Args:
        model: as in ``Trainer``.
        args: as in ``Trainer``.
        *positional: as in ``Trainer``.
        strategy: a config, a registered name such as ``"lp_ft"``, or a list of them.
        class_weights: class weights of the cross-entropy, or ``"balanced"``: n / (C * n_c) over the training labels.
        overwrite: whether checkpoints of an earlier run in ``args.output_dir`` may be deleted.
        frozen_cache: whether to compute a frozen prefix once per stage instead of in every step: ``"auto"``,
            ``"always"``, ``"never"``, or a :class:`~hf_ft.core.context.FrozenCache`.
        plain_train_dataset: unaugmented training samples in the same order, for measuring; default: ``train_dataset``.
        groups: the group of each training sample, such as its patient: strategies that hold out samples for choices of
            their own hold out whole groups. Any comparable values; a sample without one (None, NaN) forms a group of
            its own.
        source_dataset: pretraining or other data for strategies that train on it in addition to the target data:
            processed, map-style or iterable, with labels of the source head's classes.
        source_data_collator: the collator for source data; default: ``data_collator``.
        states: measurements to reuse: ``trainer.states`` of another run with the same model, data and options.
        mixup: alpha with which the images and labels of each training batch are mixed; 0 for none. See
            :class:`~hf_ft.data.Mixing`.
        cutmix: the same for replacing rectangles; if both are set, each batch is mixed in one of the two ways.
        measure_samples: number of samples of a streamed ``train_dataset`` that may be read before training, the
            same on every process; 0 for none. Strategies that measure the data need a few hundred.
        shuffle_buffer: number of consecutive samples of a streamed ``train_dataset`` that are shuffled at a time, by
            each process; 0 for the order of the data set. They are kept in memory as the data set yields them.
        **keywords: further arguments of ``Trainer``.

    Raises:
        OptionError: if a value, or its combination with ``args``, is invalid.
    """

    loss_is_scaled_for_ga = False  # losses are micro-batch means; the Trainer divides by the accumulation steps
    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    hub_model_id: Any  # a full id, once there is a repository
    data_info: Any = None  # a DataInfo, for the model card
    test_metrics: Mapping[str, float] = {}  # scores on the test data, such as test_accuracy, for the model card
    quiet: bool = False  # whether nothing is logged
    _rates: Sequence[float] = ()  # of the groups trained in the last update
    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        strategy: FTConfig | str | Iterable[FTConfig | str] = BASELINE,
        class_weights: ClassWeights | None = None,
        overwrite: bool = False,
        frozen_cache: FrozenCache | Literal["auto", "always", "never"] = "auto",
        plain_train_dataset: Any = None,
        groups: Sequence[Any] | np.ndarray | None = None,
        source_dataset: Any = None,
        source_data_collator: Callable[[list[Any]], Any] | None = None,
        states: Mapping[str, State] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        measure_samples: int = 0,
        shuffle_buffer: int = 0,
        **keywords: Any,
    ) -> None:
        self.configs = resolve(strategy)
        self.overwrite, self.plain_train_dataset = overwrite, plain_train_dataset
        self.frozen_cache = frozen_cache if isinstance(frozen_cache, FrozenCache) else FrozenCache(use=frozen_cache)
        self.source_dataset, self.source_data_collator = source_dataset, source_data_collator
        self.mixing = Mixing(mixup, cutmix)
        args = args or TrainingArguments("tmp_trainer")
        if isinstance(keywords.get("processing_class"), CollaborativeTokenizer) and not positional:
            keywords.setdefault("data_collator", collate(keywords["processing_class"]))  # padding as in Trainer
        mixing_checks.check_settings(self.mixing, self.configs, self.frozen_cache)
        self.measure_samples, self.shuffle_buffer, self.looked_at = measure_samples, shuffle_buffer, None
        data = stream_checks.train_dataset_of(positional, keywords)
        stream_checks.check_counts(data, measure_samples=measure_samples, shuffle_buffer=shuffle_buffer)
        looks = stream_checks.can_look(data, plain_train_dataset, measure_samples)
        stream = {"cache": self.frozen_cache, "mixing": self.mixing, "looks": looks, "known": states or ()}
        stream_checks.check_stream(self.configs, args, data, **stream)
        checks.preflight(self.configs, args, model, positional, keywords, source_dataset, looks)
        self.groups = given_groups(groups, data)
        self.frozen_cache = sharding.without_cache(args, self.frozen_cache)
        super().__init__(model, args, *positional, **keywords)
        sharding.check_accelerator(self.accelerator)
        mixing_checks.check_mixable(self.mixing, self.model)
        if model is None:
            data = self.train_dataset, self.eval_dataset
            sharding.check_shardable(args, self.model, self.optimizer)
            checks.check_model(self.configs, args, self.model, *data, self.lr_scheduler, source_dataset, looks)
            checks.check_smoothing(args, self.model, self.compute_loss_func)
        if args.label_names is None and not self.label_names:
            self.label_names = ["labels"]  # the model's forward names none: the task loss takes them
        # Both belong to the task loss: if set here, the Trainer would count items and scale the loss again.
        function, self.compute_loss_func = self.compute_loss_func, None
        self.model_accepts_loss_kwargs = False
        self.accelerator.gradient_accumulation_steps = 1  # older Trainers let accelerate divide by it a second time
        weights = checks.class_weights_of(class_weights, self.train_dataset, self.model, function, self.label_smoother)
        self.task_loss = TaskLoss(self.label_smoother, weights, function)
        self._known_states = dict(states or {})
        self._users_optimizer = self.optimizer
        self._checkpoints = Checkpoints(self)
        self._run: Run | None = None
        self._attempt: Attempt | None = None
        self._finished = False
        self._resuming: Path | None = None
        checks.warn_recommended(self.configs, args, self.model)
        trackers.adopt(self.callback_handler.callbacks, trackers.chosen_in(args), self.configs)
        # First in the list: change stages and finalise the model before any other callback runs.
        self.callback_handler.callbacks.insert(0, StageBorders(self))

    def create_accelerator_and_postprocess(self) -> None:
        with sharding.without_fsdp(self.args):
            super().create_accelerator_and_postprocess()

    # --- the run -------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train through all stages; see ``Trainer.train``.

        ``resume_from_checkpoint=True`` resumes from the latest complete checkpoint, within its stage. If that is the
        checkpoint of the last step, nothing is trained: the best model is loaded and the plan finalised. A second call
        continues from the current weights as a new run, whose checkpoints replace those of the previous run.

        Raises:
            OptionError: if checkpoints of an earlier run exist, the checkpoint belongs to another strategy, or another
                process trains in the same folder.
            CheckpointError: if there is no complete checkpoint, or it started from other weights.
        """
        folder, saves = Path(self._get_output_dir(trial)), self.args.save_strategy != "no"
        with alone_in(folder, saves and self.args.should_save, self.accelerator) as self._checkpoints.writer:
            resume = self._checkpoints.resume_folder(resume_from_checkpoint, folder)
            if resume is None and saves:
                self._checkpoints.clear(folder)
            self._resuming = resume
            try:
                return super().train(str(resume) if resume else None, trial, ignore_keys_for_eval, **kwargs)
            finally:
                self._resuming = None
                if self._attempt is not None:
                    self._attempt.end()
                if self._run is not None and not self._finished:
                    self._run.thaw()

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        run = self._start_run()
        if self._users_optimizer is None:
            self.optimizer = None  # its groups and flags belong to an earlier run or a larger batch size
        # Rebuilt for every attempt, because accelerate patches the forward of the modules it prepares.
        self._attempt = Attempt.begin(self, run.objective(self.task_loss), self._attempt)
        self._attempt.data.begin(self._resuming)
        self._attempt.streams.begin(batch_size or self._train_batch_size, self._resuming)
        checks.check_last_batch(self, self._attempt.objective)
        mixing_checks.check_loss(self)
        output = super()._inner_training_loop(batch_size, *args, **kwargs)
        self._checkpoints.rotate(
            Path(self._get_output_dir(kwargs.get("trial")))
        )  # an earlier process may not have done so
        return output

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        """Like ``Trainer``, but train nothing if the checkpoint is that of the last step, or of an early stop.

        The Trainer checks the step count after a step, so it would take one more if the run ends within an epoch.
        """
        stopped = self._resuming is not None and stopped_early(self.callback_handler.callbacks)
        if self.state.global_step < self.state.max_steps and not stopped:
            assert self._attempt is not None
            self._attempt.epoch.fill_(epoch)
            self._attempt.data.skip = kwargs["steps_trained_in_current_epoch"]
            self._attempt.begin_epoch(epoch, self.state.global_step, partial(looking, self))
            super()._run_epoch(model, epoch, *args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _start_run(self) -> Run:
        """Measure, plan and apply surgery, once per model."""
        if self._run is not None and self._run.model is self.model and not self._finished:
            self._run.thaw()
            return self._run
        self._finished = False
        self._checkpoints.note_base()
        place = partial(sharding.place, self.args)
        self._run = set_up(self.model, self.configs, states=self._states(), place=place)
        if self._run.model is not self.model:
            self.model = self.model_wrapped = self._run.model
        if self._resuming is not None and (self._run.anchors or self._run.reference or self._run.origin):
            self._checkpoints.check_base(self._resuming)
        if any(term.layers for term in self._run.plan.terms) and measurable(self) is not None:
            self._run.find_layouts(self.context())
        return self._run

    def _states(self) -> dict[str, State]:
        """Load the measurements from the checkpoint, or measure and broadcast from rank 0."""
        if self._resuming is not None:
            return self._checkpoints.states(self._resuming)
        states = measure(self.configs, self.model, self.context, self._known_states)
        return broadcast_object_list([states])[0] if self.args.world_size > 1 else states

    @property
    def states(self) -> Mapping[str, State]:
        """The measurements of the strategies, by name; empty before training."""
        return self._run.states if self._run is not None else {}

    def measure(self) -> Mapping[str, State]:
        """Run the strategies' measurements now instead of at the start of training, and return them."""
        return self._start_run().states

    def context(self) -> Context:
        """The context for measurements: samples and training recipe."""
        return measuring_context(self)

    def _finish_run(self) -> None:
        assert self._run is not None
        if self._run.plan.select and self._attempt is not None:
            self._attempt.cache.forget()  # recorded with the weights of the last stage
        self._run = select(self, self._run)
        self.model = self.callback_handler.model = self._run.finish()
        self._finished = bool(self._run.plan.finalise)  # the model was replaced: the next train() starts anew

    # --- what the Trainer trains ---------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Pass the objective to the Trainer in place of the model; ``self.model`` remains the user's model."""
        if training:
            assert self._attempt is not None
            if self.args.ddp_find_unused_parameters is None and self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters |= self._attempt.objective.sometimes_unused
            if self.accelerator.num_processes > 1:
                self._attempt.objective.gather = self.accelerator.gather
            if is_sharded(self.model):  # which reduces gradients, so that there is no DDP
                return self.accelerator.prepare_model(self._attempt.objective, False, evaluation_mode=True)
            return self.accelerator.prepare_model(self._attempt.objective)
        if self._attempt is None or self._attempt.objective.model is not self.model:
            self._attempt = Attempt.begin(self, Objective(self.model, Plan(), task_loss=self.task_loss), self._attempt)
            self.accelerator.prepare_model(self._attempt.objective, evaluation_mode=True)
        return self._attempt.objective

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The Trainer's optimizer over all parameters ever trained, with groups split by stage and learning rate."""
        run = self._start_run()
        plan = run.plan
        if self._users_optimizer is not None:  # whose rates were set deliberately
            plan = dataclasses.replace(plan, learning_rate=None)
        run.unfreeze()
        with accepted("the optimizer"):
            super().create_optimizer(run.model)
        regroup(self.optimizer, run.model, plan, run.trainable)
        extra = term_groups(plan, self.args.learning_rate, self.args.weight_decay)
        for group in extra if self._users_optimizer is None else ():
            self.optimizer.add_param_group(group)
        if extra and self._users_optimizer is not None:
            checks.warn_left_out(plan)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Like ``Trainer``, but exclude normalisation layers by type: many models do not use the names it looks for."""
        bare = undecayed_names(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in bare]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The Trainer's scheduler; with several stages, one that repeats its schedule in each stage.

        Stages with a schedule of their own follow that instead.
        """
        run = self._start_run()
        stages = run.plan.stages
        borders = stage_borders(stages, num_training_steps)
        if self._attempt is not None:
            self._attempt.stepper.borders = borders
            self._attempt.stepper.attach(optimizer or self.optimizer)
        checks.warn_slow_statistics(self.model, run.trained, num_training_steps)
        with accepted("the learning rate schedule"):
            if len(stages) == 1 and stages[0].schedule is None:
                return super().create_scheduler(num_training_steps, optimizer)
            if self.lr_scheduler is None:
                checks.warn_own_schedule(run.plan, self.args)
                by_arguments = partial(curve, self.args)
                self.lr_scheduler = stage_scheduler(optimizer or self.optimizer, stages, borders, by_arguments)
                self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return whole(super()._clip_grad_norm(self._trained_alone(model)))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return whole(super()._get_grad_norm(self._trained_alone(model), grad_norm))

    def _trained_alone(self, model: nn.Module) -> Any:
        """A stand-in for the model that returns only the trained parameters: iterating over all modules is slow."""
        attempt = self._attempt
        return model if attempt is None else SimpleNamespace(parameters=lambda: attempt.objective.trained)

    # --- batches and logs ----------------------------------------------------------------------------------

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """Like ``Trainer``, but read recorded activations where available, and augment as in an uninterrupted run."""
        attempt = self._attempt
        if attempt is not None and is_training and dataset is self.train_dataset and attempt.data.used:
            return attempt.data.loader(batch_size)
        rows = None if attempt is None else attempt.cache.rows_for(dataset, description, is_training)
        seeded = is_training and is_map_style(dataset)
        if attempt is None or (rows is None and not seeded):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = None if sampler_fn is None else lambda _: ordered_by_epoch(sampler_fn(dataset), seed, attempt.epoch)
        read: Any = dataset if rows is None else rows
        batched: Any = attempt.cache.collator_for(read, description)
        if seeded:
            how = attempt.objective.plan.second_view, self.mixing, mixing_checks.classes_of(self.model)
            batched, read = TrainingBatches(read, batched, seed, attempt.epoch, *how), range(len(dataset))
        users, self.data_collator = self.data_collator, batched
        try:
            return super()._get_dataloader(read, description, batch_size, sampler, is_training, dataloader_key)
        finally:
            self.data_collator = users

    def _set_signature_columns_if_needed(self) -> None:
        """Like ``Trainer``, plus the numbered inputs of models with several members."""
        super()._set_signature_columns_if_needed()
        more = getattr(unwrap(self.model)[0], "input_names", ())
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *more]))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``Trainer``; each micro-batch will be weighted by its number of rows."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._attempt is not None:
            self._attempt.begin_update(batches)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the objective: task and terms in training, the task alone in evaluation."""
        assert self._attempt is not None
        outputs = self._attempt.outputs(model, inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Like ``Trainer``, but samples that only fill up the last batch of a rank do not count in the loss."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        own = own_rows(inputs, self.accelerator)
        if loss is not None and 0 < own < rows_of(inputs):
            loss = super().prediction_step(model, leading(inputs, own), True, ignore_keys)[0]
        elif is_sharded(self.model) and fills_up(self.accelerator):  # as another process does
            super().prediction_step(model, inputs, True, ignore_keys)
        return loss, logits, labels

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Like ``Trainer``, but 0 for recorded activations."""
        return 0 if starts_at_borders(inputs) else super().floating_point_ops(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.quiet:
            return
        if "loss" in logs and self._attempt is not None:
            logs.update(self._attempt.log.drain(self.accelerator))
            if len(self._attempt.stepper.borders) > 1:
                logs["stage"] = self._attempt.stepper.stage
            if len(set(self._rates)) > 1:
                logs |= {"learning_rate_min": min(self._rates), "learning_rate_max": max(self._rates)}
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        """Learning rate of the first parameter group trained in this stage: the backbone's, if it is trained."""
        groups = getattr(self.optimizer, "param_groups", [])
        stage = 0 if self._attempt is None else self._attempt.stepper.stage
        self._rates = [float(g["lr"]) for g in groups if STAGE_RATES in g and g[STAGE_RATES][stage]]
        return self._rates[0] if self._rates and len(groups) > 1 else super()._get_learning_rate()

    # --- evaluating ----------------------------------------------------------------------------------------

    def _averaged(self) -> AbstractContextManager[None]:
        """In training, the average in place of the weights, if there is one; afterwards the model is the average."""
        return averaged(None if self._run is None else self._run.average)

    def _precision_kept(self) -> AbstractContextManager[None]:
        """For evaluation in half precision outside training, for which ``Trainer`` converts the model for good."""
        half = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        return precision_kept(self.model) if half else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._averaged(), self._precision_kept():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._averaged(), self._precision_kept():
            return super().predict(*args, **kwargs)

    # --- saving and loading --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Like ``Trainer``, but write to a temporary folder and rename it when complete."""
        self._checkpoints.save(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if is_sharded(self.model):
            state_dict = whole_state(self.model)
            if not self.args.should_save:
                return
        ours = (folder / CONFIG_NAME).is_file()
        with files_written_whole(folder) as written, self._averaged():
            super()._save(str(written), state_dict)
            self._checkpoints.save_beside_weights(written)
            write_card(card_of(self, self._checkpoints.base_name, folder), written)
            saved = {path.name for path in written.iterdir()}
        remove_replaced(folder, saved, ours)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            sharding.save_training_state(self.optimizer, self.lr_scheduler, output_dir, self.args.should_save)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Like ``Trainer``, plus the stream positions of each rank."""
        super()._save_rng_state(output_dir)
        if self._attempt is not None:
            self._attempt.data.save(Path(output_dir))
            self._attempt.streams.save(Path(output_dir))

    def create_model_card(self, *args: Any, model_name: str | None = None, **kwargs: Any) -> None:
        """Write README.md to the output folder: strategy, options, paper, base model, metrics."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            write_card(card_of(self, self._checkpoints.base_name, folder, model_name or "", **kwargs), folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model in ``output_dir`` and upload it with its card; see ``Trainer.push_to_hub``.

        None of the other files there are uploaded: no logs, and nothing that reveals anything about this machine.

        Raises:
            HubError: if it cannot be uploaded. Nothing is lost; the message says how to continue.
        """
        given = {"token": token, "revision": revision, "private": private, **kwargs}
        return push_result(self, commit_message or "End of training", blocking, **given)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository; see ``Trainer.init_hf_repo``.

        Raises:
            HubError: if it cannot be created.
        """
        if self.is_world_process_zero():
            with refused_repository(self):
                create_repository(self, token, private)

    def save_delta(self, path: str | Path) -> None:
        """Save only the tensors and buffers changed by training; :func:`hf_ft.load_delta` restores them.

        Raises:
            CheckpointError: before training, or if the model supports no delta.
        """
        self._checkpoints.save_delta(path)

    def push_delta(
        self,
        repo_id: str,
        path: str | Path | None = None,
        *,
        commit_message: str = "Upload delta",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **about: Any,
    ) -> Any:
        """Upload only what training changed, with the processor and a card; ``hf_ft.load_delta(repo_id)`` restores it.

        Args:
            path: where it is saved first (default: ``ft_delta`` in ``output_dir``).
            about: ``license``, ``tags``, ``dataset``, ``language`` for the card.

        Returns:
            The commit; None on processes other than the first.

        Raises:
            CheckpointError: before training, or if the model supports no delta.
            HubError: if it cannot be uploaded. It has been saved by then; the message says how to continue.
        """
        folder = Path(path) if path is not None else Path(str(self.args.output_dir)) / DELTA_FOLDER
        self._checkpoints.save_delta(folder, repo_id, **about)
        if not self.is_world_process_zero():
            return None
        options: dict[str, Any] = {"token": token or self.args.hub_token, "revision": revision, "private": private}
        return push_to_hub(folder, repo_id, commit_message=commit_message, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._start_run()  # terms refer to the initial weights, not to those of the checkpoint
        self._checkpoints.load(resume_from_checkpoint, to_resume=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Like ``Trainer``; files that do not fit are named."""
        with read_from(str(checkpoint), "optimizer.pt and scheduler.pt"):
            own = settings(self.optimizer)
            if checkpoint is not None and is_sharded(self.model):
                sharding.load_training_state(self.optimizer, self.lr_scheduler, checkpoint)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            check_settings(own, settings(self.optimizer))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Like ``Trainer``; files that do not fit are named."""
        with read_from(str(checkpoint), "the random states (rng_state*.pth)"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        logger.info(f"Loading best model from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        self._checkpoints.load(str(self.state.best_model_checkpoint))
