"""The objective: a plan's total loss as one module, so that DDP, autocast and compilation cover all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.core.plan import Need, Plan, Stage, Term, trained_by
from hf_ft.core.task_loss import TaskLoss
from hf_ft.core.view import LayerStates, View
from hf_ft.engine.averaging import RunningAverage
from hf_ft.engine.batch import STREAM, recorded_states, take_activations, take_second_view, take_streams
from hf_ft.engine.forward import Head, StreamBatch, Wanted, forward, inputs_of, logit_inputs_of_copies
from hf_ft.engine.frozen.freezing import liveness, moving_norms, with_dropout
from hf_ft.engine.frozen.prefix import FrozenPrefix
from hf_ft.engine.frozen.reference import Reference
from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.models.border import SOURCE_LOGITS, has_parameters
from hf_ft.models.feature_hooks import run_to
from hf_ft.models.find_layouts import look_at
from hf_ft.models.head_layers import logit_layers
from hf_ft.models.layouts import Layouts
from hf_ft.models.names import Names, covered, covers
from hf_ft.models.norms import batch_norms, drops_layers
from hf_ft.models.parts import Chain
from hf_ft.models.preserve import acts_on_train, observing
from hf_ft.models.source_head import border_head


class Objective(nn.Module):
    """Model and plan as one module: takes the model's keyword arguments, returns its outputs with the total loss.

    In training, ``outputs["loss"]`` is the task loss plus all terms, and ``outputs["terms"]`` holds each detached
    summand by name. In evaluation the loss is the task loss alone, so that selecting the best model does not depend
    on the strength of regularisation.

    Args:
        model: the user's model.
        plan: the plan that :func:`hf_ft.engine.set_up.set_up` composed from the strategies.
        chains: the model's parts in forward order (anatomy); everything before the first trained part runs in eval
            mode, dropout and norms included.
        trainable: names of the parameters that may be trained at all.
        anchors: initial values by parameter name.
        task_loss: the task loss.
        reference: the initial model, for terms that compare with it.
        layouts: how the terms' layers lay out their outputs; determined on the first batch if not yet known.
        average: the running average of the model's weights, if the plan has one.

    Attributes:
        terms: terms of the plan that are active in the current stage.
        reference_layers: layers whose reference states these terms need.
        prefix: if set, batches with activations at its borders skip everything before; other batches run normally.
        alive: what trains, and which norms update their statistics, in the current stage.
        trained: parameters trained in the current stage, including those of terms.
        share: factor of the loss in training: the number of rows of this micro-batch over its mean in the update.
        gather: returns the rows of all processes; None if there is one process, or each trains by itself.
    """

    # Tells transformers.Trainer that losses are micro-batch means: otherwise, losses and gradients of many models are
    # multiplied by the number of accumulation steps (transformers#47688).
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        chains: Sequence[Chain] = (),
        trainable: Sequence[str] | None = None,
        anchors: Mapping[str, Tensor] | None = None,
        task_loss: TaskLoss | None = None,
        reference: Reference | None = None,
        layouts: Layouts | None = None,
        average: RunningAverage | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.task_loss = task_loss or TaskLoss()
        self.term_modules = plan.term_modules
        self.progress, self.share = 0.0, 1.0
        self.gather: Callable[[Tensor], Tensor] | None = None
        self.chains = tuple(chains)
        self._trainable = list(trainable if trainable is not None else dict(model.named_parameters()))
        self.reference = reference
        self.layouts = layouts or Layouts()
        self.average = average
        self._view = View(model, anchors or {})
        self._asleep: list[nn.Module] = []
        self._awake: list[nn.Module] = []
        self._settled = False
        self._dropout = True
        self._layers = _layers(plan.terms)
        self._live_layers: set[str] = set()  # those after a trained parameter
        self._skippable: set[str] = set()  # layers that did not run in some step, but do in evaluation
        self.prefix: FrozenPrefix | None = None
        self.trained: list[nn.Parameter] = list(self.parameters())
        everything = [name for name, _ in model.named_parameters()]
        self.alive = liveness(model, self.chains, everything, ())
        modules = tuple(name for chain in self.chains for name in chain.parts[-1].modules)
        weighted = tuple(name for name in modules if has_parameters(model, name))
        self._head = Head(modules, border_head(model, modules), logit_layers(model, weighted, trainable=False))
        self._choose_terms()

    def forward(self, **batch: Any) -> dict[str, Any]:
        recorded, streams = recorded_states(batch), take_streams(batch)
        at_borders, second = take_activations(batch), take_second_view(batch)
        if at_borders:
            assert self.prefix is not None
            with self.prefix.replaying(at_borders):
                return self._forward(self.prefix.batch(batch, len(at_borders[0])), recorded, streams, second)
        return self._forward(batch, recorded, streams, second)

    def _forward(
        self,
        batch: dict[str, Any],
        recorded: Mapping[str, Tensor],
        streams: dict[str, dict[str, Any]],
        second: dict[str, Any],
    ) -> dict[str, Any]:
        if not self.training:
            loss, outputs = self.task_loss(self.model, batch)
            return outputs if loss is None else {"loss": loss, **outputs}
        active = self._active_terms()
        others = self._stream_batches(active, streams)
        look_at(self.layouts, self.model, self._layers, batch)
        result = forward(
            self.model,
            self.task_loss,
            batch,
            layers=_layers(term for term, _ in active if term.stream is None),
            head=self._head,
            wants=Wanted(_needed("features", active), _needed("logit_inputs", active)),
            streams=others,
            layouts=self.layouts,
        )
        loss, outputs = result.loss, result.outputs
        if loss is None:
            return outputs
        for other in others:
            self._check_skipped(other.layers, result.streams[other.stream.name].states, other.batch)
        view = self._view
        view.batch = batch if _needed("inputs", active) else {}
        view.second_view = (second or inputs_of(batch)) if _needed("second_view", active) else {}
        view.outputs, view.features, view.progress = outputs, result.features, self.progress
        view.logit_inputs = None if result.logit_inputs is None else wide(result.logit_inputs)
        view.streams, view.border = result.streams, result.border
        view._gather, view._run = self.gather, logit_inputs_of_copies(self._head, loss.device.type)
        self._look_at_states(active, result.states, recorded, batch, loss.device)
        view.token_masks = result.masks
        total = self.share * loss
        terms = {"task": total.detach()}
        # Weight differences and kernels of features need float32, whatever the model's dtype.
        with torch.autocast(loss.device.type, enabled=False):
            for term, factor in active:
                ran = _has_layers(term, view)  # else LayerDrop skipped all of its layers
                value = (factor * self.share) * term.fn(view).to(loss.device) if ran else torch.zeros_like(loss)
                total = total + value
                terms[term.name] = value.detach()
        view.release()
        return {"loss": total, "terms": terms, **outputs}

    def _active_terms(self) -> list[tuple[Term, float]]:
        """The currently active terms, each with its weight."""
        return [(term, factor) for term in self.terms if (factor := self._factor(term)) != 0.0]

    @property
    def live_streams(self) -> tuple[str, ...]:
        """Streams whose batch the current step needs, as ``stream_<name>`` in addition to the target's."""
        return tuple(dict.fromkeys(term.stream for term, _ in self._active_terms() if term.stream is not None))

    @property
    def sometimes_unused(self) -> bool:
        """Whether a trained parameter gets no gradient in some step: its stage or term is inactive, or LayerDrop."""
        trainable_terms = [term for term in self.plan.terms if isinstance(term.fn, nn.Module)]
        idle = any(term.schedule is not None or term not in self.terms for term in trainable_terms)
        return len(self.plan.stages) > 1 or idle or drops_layers(self.model)

    @property
    def uses_reference(self) -> bool:
        """Whether a term compares with the initial model in the current step."""
        return any("reference" in term.needs for term, _ in self._active_terms())

    def _stream_batches(
        self, active: Sequence[tuple[Term, float]], given: Mapping[str, Mapping[str, Any]]
    ) -> list[StreamBatch]:
        names = {term.stream for term, _ in active if term.stream is not None}
        missing = sorted(names - set(given))
        if missing:
            raise OptionError(
                f"a loss term needs a batch of the stream {missing[0]!r}: pass it to the objective as "
                f"{STREAM}{missing[0]}={{...}}."
            )
        return [
            StreamBatch(s, given[s.name], _layers(term for term, _ in active if term.stream == s.name))
            for s in self.plan.streams
            if s.name in names
        ]

    def _factor(self, term: Term) -> float:
        return term.weight * (term.schedule(self.progress) if term.schedule else 1.0)

    def _look_at_states(
        self,
        active: Sequence[tuple[Term, float]],
        states: Mapping[str, Tensor],
        recorded: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        """Fill the view with the states of its terms' layers, and with reference states, recorded or computed."""
        mine = [term for term, _ in active if term.stream is None]
        self._check_skipped(_layers(mine), states, batch)
        hidden = [name for name in states if name in self._live_layers and not states[name].requires_grad]
        border = self._view.border if any(SOURCE_LOGITS in term.layers for term in mine) else None
        if border and SOURCE_LOGITS in self._live_layers and not any(state.requires_grad for state in border.tensors):
            hidden.append(SOURCE_LOGITS)
        if hidden and torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False):
            raise OptionError(
                f"no gradient flows from layer {hidden[0]!r}, which a loss term needs. With gradient checkpointing, "
                "set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        wanted = [layer for term in mine if "reference" in term.needs for layer in term.layers]
        layers = [layer for layer in wanted if layer in states or layer == SOURCE_LOGITS]
        # Text recorded in another batch may be padded to another length.
        reference = {
            name: state
            for name, state in recorded.items()
            if name == SOURCE_LOGITS or (name in states and state.shape == states[name].shape)
        }
        missing = [layer for layer in dict.fromkeys(layers) if layer not in reference]
        if missing:
            assert self.reference is not None
            reference |= self.reference.states(missing, batch, device)
        view = self._view
        view.states = LayerStates({name: wide(state) for name, state in states.items()})
        view.reference = {name: wide(reference[name]) for name in layers}

    def _check_skipped(self, layers: Names, states: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Accept layers that did not run in this step if they run in evaluation: LayerDrop skips some at random.

        Raises:
            OptionError: if one of them does not run in evaluation either.
        """
        known = {*states, *self._skippable, SOURCE_LOGITS}
        unknown = [layer for layer in layers if layer not in known]
        if unknown:
            with observing(self.model):
                run_to(self.model, unknown, inputs_of(batch))
            self._skippable.update(unknown)

    def enter(self, stage: Stage) -> None:
        """Train the parameters of this stage and no others; select the modules that run in eval mode."""
        trained = set(trained_by(stage, self.model, self._trainable))
        super().zero_grad()  # gradients of the previous stage
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._view.forget()
        moving = moving_norms(self.model, stage, trained)
        self.alive = liveness(self.model, self.chains, trained, moving)
        norms = dict(batch_norms(self.model))
        self._asleep = [*self.alive.resting, *(norm for name, norm in norms.items() if name not in moving)]
        self._dropout = with_dropout(self.model, stage, trained, self._head.modules)
        self._awake = [norms[name] for name in moving] if stage.norm_mode == "train" or not stage.dropout else []
        # What these keep between passes in eval mode would be outdated after each step.
        trains = {module for module in self.model.modules() if any(p.requires_grad for p in module.parameters(False))}
        self._awake += filter(acts_on_train, trains)
        self.prefix = None
        self._settled = False
        self._choose_terms()
        layers = {layer for term in self.terms for layer in term.layers}
        self._live_layers = {layer for layer in layers if self._follows(layer, self.alive.trained_from)}
        self.train(self.training)

    def _choose_terms(self) -> None:
        """Select the terms active in this stage: all except those that depend only on what cannot change in it."""
        self.terms = [term for term in self.plan.terms if self._can_change(term)]
        reference = (layer for term in self.terms if "reference" in term.needs for layer in term.layers)
        self.reference_layers = tuple(dict.fromkeys(reference))
        self.wants_inputs = any(term.layers or term.stream or "inputs" in term.needs for term in self.terms)

    def _can_change(self, term: Term) -> bool:
        """Whether layers of a term, or the input of the logits that it needs, follow something that changes."""
        begins = self.alive.live_from
        if term.layers:
            return any(self._follows(layer, begins) for layer in term.layers)
        if "logit_inputs" not in term.needs or not self.chains:
            return True
        begins_before = any(begin < len(chain.parts) - 1 for chain, begin in zip(self.chains, begins, strict=True))
        head, logits = set(self._head.begins), set(self._head.logits)
        inside = [name for name, _ in self.model.named_parameters() if covered(name, head)]
        return begins_before or not all(covered(name, logits) for name in inside)

    def _follows(self, layer: str, begins: Sequence[int]) -> bool:
        """Whether a layer lies in, or contains, one of its chain's parts from this index on."""
        for chain, begin in zip(self.chains, begins, strict=True):
            inside = [
                index
                for index, part in enumerate(chain.parts)
                for module in part.modules
                if covers(module, layer) or covers(layer, module)
            ]
            # An activation between two parts, for example, is in neither: it may be anywhere before the head.
            last = max(inside, default=len(chain.parts) - 2 if covers(chain.name, layer) else -1)
            if last >= begin:
                return True
        return not self.chains

    def train(self, mode: bool = True) -> Objective:
        if mode and self._settled and self.training and self.model.training:
            return self  # the Trainer calls this every step: walking all modules takes longer than a linear-probe step
        super().train(mode)
        self._settled = mode
        if mode:  # which has also switched frozen modules to train mode
            if not self._dropout:
                for module in self.model.modules():
                    module.training = getattr(module, "gradient_checkpointing", False)
            for module in self._asleep:
                module.training = False
            for module in self._awake:
                module.training = True
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of trained parameters only: walking all modules each step is slow."""
        for parameter in self.trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()


def _has_layers(term: Term, view: View) -> bool:
    """Whether a term uses no layers, or at least one that ran in this step."""
    states = view.states if term.stream is None else view.streams[term.stream].states
    return not term.layers or SOURCE_LOGITS in term.layers or bool(states.called(term.layers))


def _needed(what: Need, active: Sequence[tuple[Term, float]]) -> bool:
    """Whether one of these terms needs it in its view."""
    return any(what in term.needs for term, _ in active)


def _layers(terms: Iterable[Term]) -> Names:
    """The distinct layers of some terms."""
    return tuple(dict.fromkeys(layer for term in terms for layer in term.layers))
