"""An ensemble of classifiers as one Transformers model: each member has its own loss, and all predict together."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from hf_ft.errors import OptionError
from hf_ft.models.ensemble.config import TASKS, CollaborativeConfig, common_config, described
from hf_ft.models.ensemble.files import UPLOAD, check_count, merged, read_member, upload, write_member
from hf_ft.models.ensemble.processor import column
from hf_ft.models.ensemble.soup import soup
from hf_ft.models.tasks import auto_model

__all__ = ["CollaborativeConfig", "CollaborativeModel", "CollaborativeOutput", "joint_logits"]

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Tensors that a forward accepts but that no processor produces.
_NOT_DATA = ("labels", "position_ids", "inputs_embeds", "head_mask", "bool_masked_pos")


@dataclass
class CollaborativeOutput(ModelOutput):
    """Output of an ensemble.

    Attributes:
        loss: (), sum of the members' losses, each on its own logits; only with labels.
        logits: (B, C), logits of the ensemble.
        member_logits: N tensors (B, C).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    member_logits: tuple[Tensor, ...] | None = None


def joint_logits(logits: Iterable[Tensor], prediction: str, problem_type: str) -> Tensor:
    r"""Combine the members' logits :math:`z_j` into the ensemble's.

    .. math::
        \text{sum: } \sum_j z_j, \qquad
        \text{mean probability: } \log \tfrac{1}{N} \sum_j \mathrm{softmax}(z_j)

    For multi-label problems, the latter is the logit of the mean sigmoid. Regression takes the mean of the outputs.

    Args:
        logits: N tensors (B, C).
        prediction: ``sum`` or ``mean_probability``.
        problem_type: as in the config.

    Returns:
        (B, C)
    """
    member_logits = torch.stack(tuple(logits))
    if problem_type == "regression":
        return member_logits.mean(dim=0)
    if prediction == "sum":
        return member_logits.sum(dim=0)
    wide = member_logits.to(torch.promote_types(member_logits.dtype, torch.float32))
    if problem_type == "multi_label_classification":  # 1/N occurs in both terms and cancels
        return logsigmoid(wide).logsumexp(dim=0) - logsigmoid(-wide).logsumexp(dim=0)
    return log_softmax(wide, dim=-1).logsumexp(dim=0) - math.log(len(wide))


class CollaborativeModel(hf.PreTrainedModel):
    r"""N classifiers as one model, with the loss :math:`\sum_j L_j(z_j, y)`.

    Members may be of any architecture in Transformers, but never run code from the Hub. On disk each is a plain
    checkpoint in its own folder, ``member_0``, ``member_1``, ..., which loads without this package.

    Args:
        config: config of the ensemble.
        members: the member modules; by default, new ones are built from the config.

    Raises:
        OptionError: if the config has no members.
    """

    config_class = CollaborativeConfig
    # The loss is a mean over the micro-batch, whatever the number of items in the accumulated batch.
    accepts_loss_kwargs = False
    members: Any  # nn.ModuleList

    def __init__(self, config: CollaborativeConfig, members: Sequence[Any] | None = None) -> None:
        if not config.members:
            raise OptionError("members: the config lists none. Is it the config of an ensemble?")
        attention = config._attn_implementation
        super().__init__(config)
        config._attn_implementation_internal = attention  # otherwise it would also be chosen for the members
        if members is None:
            build = auto_model(config.task).from_config
            members = [build(config.member(index), trust_remote_code=False) for index in range(len(config.members))]
        self.members = nn.ModuleList(members)
        self.training = self.members.training = all(member.training for member in members)
        self._takes = [_arguments_of(member) for member in members]
        self.main_input_name = column(members[0].main_input_name, self._inputs[0])
        self.supports_gradient_checkpointing = any(member.supports_gradient_checkpointing for member in members)
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: members initialise themselves, and a head added later would be re-initialised."""

    @classmethod
    def from_members(
        cls,
        models: Sequence[Any],
        inputs: Sequence[int] | None = None,
        prediction: str = "sum",
        sources: Sequence[str | None] | None = None,
    ) -> CollaborativeModel:
        """Build an ensemble of these modules; nothing is copied.

        Args:
            models: Transformers classifiers, all with the same labels.
            inputs: for each, the index of the distinct processor that prepares its input; by default all share one.
            prediction: ``sum`` or ``mean_probability``.
            sources: for each, the public name of the model it was loaded from.

        Raises:
            OptionError: if the models are incompatible; the message names them.
        """
        common = common_config(models)
        common |= {"inputs": inputs, "prediction": prediction, "sources": sources}
        return cls(CollaborativeConfig(members=[described(model) for model in models], **common), models)

    @property
    def _inputs(self) -> list[int]:
        return self.config.inputs

    @property
    def input_names(self) -> tuple[str, ...]:
        """The batch columns that any member reads, without the labels."""
        members = zip(self.members, self._takes, self._inputs, strict=True)
        columns = [column(name, index) for member, takes, index in members for name in _data_names(member, takes)]
        return tuple(dict.fromkeys(columns))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **more: Any,
    ) -> CollaborativeOutput:
        """Run each member on its own input.

        Args:
            pixel_values: (B, 3, H, W) from the first distinct processor; likewise ``input_ids`` (B, T), ...
            labels: (B,), or (B, C) for several labels or targets.
            more: outputs of further processors (``pixel_values_1``, ``input_ids_1``, ...), and options of the
                members' forwards, passed to those that accept them.

        Raises:
            OptionError: if the input of a member is missing.
        """
        arguments = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        arguments |= {"token_type_ids": token_type_ids, **more}
        inputs = {name: value for name, value in arguments.items() if value is not None}
        answer: dict[str, Any] = {}
        if labels is not None:
            answer["labels"] = labels
            for member in self.members:
                member.config.problem_type = self.config.problem_type
        outputs = [member(**self._arguments(index, inputs), **answer) for index, member in enumerate(self.members)]
        if labels is not None and self.config.problem_type is None:  # inferred from the labels, as in any classifier
            self.config.problem_type = self.members[0].config.problem_type
        default = "regression" if self.config.num_labels == 1 else "single_label_classification"
        logits = tuple(output.logits for output in outputs)
        return CollaborativeOutput(
            loss=None if labels is None else sum((output.loss for output in outputs[1:]), start=outputs[0].loss),
            logits=joint_logits(logits, self.config.prediction, self.config.problem_type or default),
            member_logits=logits,
        )

    def _arguments(self, index: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one member's forward: its own tensors under their plain names, and options."""
        processor, own = self._inputs[index], {}
        for name in self._takes[index]:
            if column(name, processor) in given:
                own[name] = given[column(name, processor)]
            elif name in given and not isinstance(given[name], Tensor):
                own[name] = given[name]
        if not any(isinstance(value, Tensor) for value in own.values()):
            required = column(self.members[index].main_input_name, processor)
            raise OptionError(
                f"member {index} needs {required!r}, but the inputs are {sorted(given)}: prepare them with the "
                "processor of the whole ensemble, and set remove_unused_columns=False if a Trainer drops columns."
            )
        return own

    def soup(self, *, same_ancestor: bool | None = None) -> Any:
        """A single plain model with the mean of the members' weights: see :func:`hf_ft.models.ensemble.soup.soup`.

        Raises:
            OptionError: if members differ in class, shapes, ancestor or processor.
        """
        if len(set(self._inputs)) > 1:
            raise OptionError(
                f"soup: the members use {len(set(self._inputs))} different processors, but a single model uses one. "
                "Use members with the same processor."
            )
        average = soup(self.members, self.config.ancestors, same_ancestor=same_ancestor)
        self.config.share_with(average.config)
        return average

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save ``config.json``, and each member to its own folder.

        Args:
            state_dict: weights to save instead of the current ones, with the parameter names of this model.
            push_to_hub: upload the files to ``repo_id`` (by default, the folder's name).
            options: options of ``save_pretrained`` (``max_shard_size``, ...) and of the upload.
        """
        folder = Path(save_directory)
        address = {name: options.pop(name) for name in UPLOAD if name in options}
        for index, member in enumerate(self.members):
            self.config.share_with(member.config)
            write_member(member, index, folder, state_dict, is_main_process=is_main_process, **options)
        if not is_main_process:
            return
        self.config.members = [described(member) for member in self.members]
        dtypes = {member.dtype for member in self.members}
        self.config.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        if push_to_hub:
            upload(folder, len(self.members), **address)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Any = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Load an ensemble in eval mode, each member strictly and with its own class.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            config: used instead of the saved config.
            output_loading_info: also return the members' loading infos, with the parameter names of this model.
            options: options of ``from_pretrained`` (``revision``, ``dtype``, ...).

        Raises:
            CheckpointError: if a file of a member is missing or damaged; the other members can be loaded alone.
        """
        name = str(pretrained_model_name_or_path)
        where = {key: options.pop(key) for key in _HUB if options.get(key) is not None}
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        if not isinstance(config, hf.PreTrainedConfig):
            options["return_unused_kwargs"] = True
            config, options = CollaborativeConfig.from_pretrained(config or name, **where, **options)
        check_count(config, name, where)
        config = copy.deepcopy(config)
        config.name_or_path = name
        if dtype not in (None, "auto"):
            config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        pairs = [read_member(config, index, name, where, **options) for index in range(len(config.members))]
        model = cls(config, [member for member, _ in pairs]).eval()
        return (model, merged(info for _, info in pairs)) if output_loading_info else model


def _arguments_of(member: Any) -> dict[str, bool]:
    """The argument names of a member's forward, each with whether it is a tensor."""
    parameters = inspect.signature(member.forward).parameters
    return {name: "Tensor" in str(parameter.annotation) for name, parameter in parameters.items()}


def _data_names(member: Any, takes: Mapping[str, bool]) -> list[str]:
    """The arguments of a member's forward that come from the data."""
    tensors = [name for name, is_tensor in takes.items() if is_tensor]
    # An image has no padding: an ``attention_mask`` of a vision model is an option.
    apart = _NOT_DATA if member.main_input_name == "input_ids" else (*_NOT_DATA, "attention_mask")
    return [name for name in dict.fromkeys([member.main_input_name, *tensors]) if name not in apart]


for _task in TASKS:
    auto_model(_task).register(CollaborativeConfig, CollaborativeModel, exist_ok=True)
