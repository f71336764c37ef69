"""The objective: a plan's loss as one module, so that DDP, autocast and compilation see all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_ft.anatomy import Part, batch_norms
from hf_ft.frozen_prefix import FrozenPrefix
from hf_ft.plan import Names, Plan, Stage, covers, trained_by


class View:
    """What a term of the loss may look at, for one micro-batch.

    Attributes:
        model: the model in training.
        batch: its keyword arguments, for terms that need ``"inputs"``; else empty, since a stage may start
            from recorded activations.
        outputs: what it returned.
        features: what went into the head, (B, d) or as the head takes it, for terms that need ``"features"``.
        progress: how much of the run is done, in [0, 1).
    """

    def __init__(self, model: nn.Module, anchors: Mapping[str, Tensor]) -> None:
        self.model = model
        self._anchors = anchors
        self._pairs: dict[Names, tuple[list[Tensor], list[Tensor]]] = {}
        self.batch: Mapping[str, Any] = {}
        self.outputs: Any = None
        self.features: Tensor | None = None
        self.progress = 0.0

    def weights(self, names: Names) -> list[Tensor]:
        """The parameters under these names that train in the present stage."""
        return self._pair(names)[0]

    def starts(self, names: Names) -> list[Tensor]:
        """The starting values of :meth:`weights`, in the same order."""
        return self._pair(names)[1]

    def forget(self) -> None:
        """Look parameters up anew: another stage trains others."""
        self._pairs.clear()

    def _pair(self, names: Names) -> tuple[list[Tensor], list[Tensor]]:
        if names not in self._pairs:  # once a stage: walking a module tree every step is slow
            chosen = [
                (parameter, self._anchors.get(name))
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and any(covers(prefix, name) for prefix in names)
            ]
            weights: list[Tensor] = [parameter for parameter, _ in chosen]
            starts = [start.to(parameter.device) for parameter, start in chosen if start is not None]
            self._pairs[names] = (weights, starts)
        return self._pairs[names]


class TaskLoss:
    """The loss of the task alone, a mean over the micro-batch.

    Without any of the arguments it is the model's own (which follows ``config.problem_type``).

    Args:
        label_smoother: as the Trainer makes it from ``label_smoothing_factor``.
        class_weights: (C,), a weight per class of a cross-entropy.
        compute_loss_func: ``f(outputs, labels, num_items_in_batch=...)``; the number is that of this
            micro-batch, so that sums divided by it and plain means are the same thing.
    """

    def __init__(
        self,
        label_smoother: Callable[..., Tensor] | None = None,
        class_weights: Tensor | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
    ) -> None:
        self.label_smoother = label_smoother
        self.class_weights = class_weights
        self.compute_loss_func = compute_loss_func

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        own_loss = not (self.label_smoother or self.compute_loss_func or self.class_weights is not None)
        if own_loss or batch.get("labels") is None:
            outputs = _as_dict(model(**batch))
            return outputs.pop("loss", None), outputs
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        outputs = _as_dict(model(**inputs))
        return self._loss(outputs, batch["labels"]), outputs

    def _loss(self, outputs: dict[str, Any], labels: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=labels.ne(-100).sum())
        if self.class_weights is not None:
            weights = self.class_weights.to(outputs["logits"].device)
            return nn.functional.cross_entropy(outputs["logits"].float(), labels, weight=weights)
        assert self.label_smoother is not None
        return self.label_smoother(outputs, labels)


# A batch of a stage that starts at a frozen prefix's border holds the activations there under this name.
ACTIVATION = "frozen_prefix_activation"


class Objective(nn.Module):
    """Model and plan as one module: keyword arguments of the model in, its outputs with the whole loss out.

    In training ``outputs["loss"]`` is task + terms and ``outputs["terms"]`` holds each summand, detached, by
    name. In evaluation the loss is the task's alone, so that choosing the best model does not depend on how
    strongly it was held.

    Args:
        model: the user's model.
        plan: what :func:`hf_ft.run.set_up` made of the strategies.
        parts: the model's parts in forward order (anatomy); those before the first that trains run in eval
            mode, dropout and norms alike.
        trainable: names of the parameters that may train at all.
        anchors: starting values by parameter name.
        task_loss: the loss of the task.

    Attributes:
        prefix: where set, batches with ``ACTIVATION`` run only what follows it; others run as always.
        live_parts: the parts from the first on that trains, or whose norms move, in the present stage.
        trained: the parameters that train in it, those of terms too.
    """

    # Tells transformers.Trainer that losses are micro-batch means: without it, losses and gradients of many
    # models come out times the accumulation steps (transformers#47688).
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        parts: Sequence[Part] = (),
        trainable: Sequence[str] | None = None,
        anchors: Mapping[str, Tensor] | None = None,
        task_loss: TaskLoss | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.task_loss = task_loss or TaskLoss()
        self.term_modules = nn.ModuleDict({t.name: t.fn for t in plan.terms if isinstance(t.fn, nn.Module)})
        self.progress = 0.0
        self.parts = tuple(parts)
        self._trainable = list(trainable if trainable is not None else dict(model.named_parameters()))
        self._view = View(model, anchors or {})
        self._asleep: list[nn.Module] = []
        self._awake: list[nn.Module] = []
        self._settled = False
        self.prefix: FrozenPrefix | None = None
        self.live_parts = self.parts
        self.trained: list[nn.Parameter] = list(self.parameters())
        self._wants_features = any("features" in term.needs for term in plan.terms)
        self.wants_inputs = any("inputs" in term.needs for term in plan.terms)

    def forward(self, **batch: Any) -> dict[str, Any]:
        if ACTIVATION in batch:
            assert self.prefix is not None
            activation = batch.pop(ACTIVATION)
            with self.prefix.replaying(activation):
                return self._forward(self.prefix.batch(batch, len(activation)))
        return self._forward(batch)

    def _forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        with _FeatureTap(self._head() if self._wants_features and self.training else None) as tap:
            loss, outputs = self.task_loss(self.model, batch)
        if loss is None:
            return outputs
        if not self.training:
            return {"loss": loss, **outputs}
        view = self._view
        view.batch = batch if self.wants_inputs else {}
        view.outputs, view.features, view.progress = outputs, tap.features, self.progress
        total, terms = loss, {"task": loss.detach()}
        # Differences of weights and kernels of features need float32, whatever the model computes in.
        with torch.autocast(loss.device.type, enabled=False):
            for term in self.plan.terms:
                factor = term.weight * (term.schedule(self.progress) if term.schedule else 1.0)
                if factor == 0.0:
                    continue
                value = factor * term.fn(view).to(loss.device)
                total = total + value
                terms[term.name] = value.detach()
        view.batch, view.outputs, view.features = {}, None, None  # let go of the graph
        return {"loss": total, "terms": terms, **outputs}

    def enter(self, stage: Stage) -> None:
        """Make this stage's parameters train, and no others; choose what runs in eval mode."""
        trained = set(trained_by(stage, self.model, self._trainable))
        super().zero_grad()  # those of the last stage
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._view.forget()
        asleep = self._frozen_prefix(trained)
        awake: list[nn.Module] = []
        moving: list[str] = []
        for name, norm in batch_norms(self.model):
            own = any(covers(name, parameter) for parameter in trained)
            if stage.norm_mode == "train" or (stage.norm_mode == "auto" and own):
                awake.append(norm)
                moving.append(name)
            else:
                asleep.append(norm)
        self._asleep, self._awake = asleep, awake if stage.norm_mode == "train" else []
        self.prefix = None
        self._settled = False
        self.live_parts = self.parts[self._first_part({*trained, *moving}) :]
        self.train(self.training)

    def train(self, mode: bool = True) -> Objective:
        if mode and self._settled and self.training and self.model.training:
            return self  # the Trainer calls this every step: going through all modules takes longer than a probe's step
        super().train(mode)
        self._settled = mode
        if mode:  # which would have woken what is frozen
            for module in self._asleep:
                module.training = False
            for module in self._awake:
                module.training = True
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any module; only what trains has gradients, and going through all modules each step is slow."""
        for parameter in self.trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def _frozen_prefix(self, trained: set[str]) -> list[nn.Module]:
        """Every module of the parts that come before the first part with a trained parameter."""
        prefix: list[nn.Module] = []
        first = self._first_part(trained)
        for part in self.parts[:first] if first < len(self.parts) else ():
            for name in part.modules:
                try:
                    prefix += self.model.get_submodule(name).modules()
                except AttributeError:  # a single parameter
                    continue
        return prefix

    def _first_part(self, names: set[str]) -> int:
        """The index of the first part that holds one of these parameters or modules."""
        holds = (any(covers(module, name) for module in part.modules for name in names) for part in self.parts)
        return next((index for index, found in enumerate(holds) if found), len(self.parts))

    def _head(self) -> nn.Module:
        return self.model.get_submodule(self.parts[-1].modules[0])


class _FeatureTap:
    """Records what goes into a module while it is open."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self.features: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> _FeatureTap:
        if self.module is not None:
            self._handle = self.module.register_forward_pre_hook(self._record)
        return self

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0]
        self.features = features.flatten(1) if features.dim() == 4 else features

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.remove()


def _as_dict(outputs: Any) -> dict[str, Any]:
    """Model outputs as a dictionary, tuples (``return_dict=False``) as well."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    first_is_loss = outputs[0].dim() == 0
    return dict(zip(("loss", "logits") if first_is_loss else ("logits",), outputs, strict=False))
