"""The code in a model card that loads the model."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from hf_ft.documents.usage import adapter_usage, pipeline_usage
from hf_ft.models.gated.model import GatedModel
from hf_ft.models.sharding import plain_class
from hf_ft.models.tasks import auto_name
from hf_ft.models.weight_files import COLLABORATIVE, member_folder


def is_ensemble(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == COLLABORATIVE


def usage(model: Any, model_name: str, task: str | None = None, base: str | None = None) -> str:
    """How to use a saved model.

    Args:
        task: ``image``, ``text`` or ``audio``, if a pipeline can do it: if its processor is saved with it.
        base: Hub id of an adapter's base.
    """
    if isinstance(model, PeftModel):
        return adapter_usage(model_name, plain_class(model.get_base_model()).__name__, base)
    if isinstance(model, PreTrainedModel) and is_ensemble(model):
        return _ensemble_usage(model, model_name)
    if isinstance(model, GatedModel):
        name = auto_name(model.task)
        return (
            f"import hf_ft  # registers the model with Transformers\nfrom transformers import {name}\n\n"
            f'model = {name}.from_pretrained("{model_name}")'
        )
    name = plain_class(model).__name__
    alone = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{model_name}")'
    return alone if task is None else f"{pipeline_usage(model_name, task)}\n\n# The model alone:\n{alone}"


def delta_usage(model_name: str, base_on_hub: bool) -> str:
    """How to load a delta."""
    base = "" if base_on_hub else "base, "
    comment = "" if base_on_hub else "  # base: Hub id or folder of the base model"
    return f'import hf_ft\n\nmodel = hf_ft.load_delta({base}"{model_name}"){comment}'


def _ensemble_usage(model: Any, model_name: str) -> str:
    name = auto_name(model.config.task)
    tokenizers = []
    if model.config.task == "text" and len(set(model.config.inputs)) > 1:  # AutoTokenizer does not support this
        tokenizers = [f'tokenizer = hf_ft.CollaborativeTokenizer.from_pretrained("{model_name}")']
    return "\n".join(
        [
            "import hf_ft  # registers the ensemble with Transformers",
            f"from transformers import {name}",
            "",
            f'model = {name}.from_pretrained("{model_name}")',
            *tokenizers,
            "",
            "# A single member, which does not need hf_ft:",
            f'member = {name}.from_pretrained("{model_name}", subfolder="{member_folder(0)}")',
        ]
    )
