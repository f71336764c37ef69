"""The base model of a delta or an adapter, with the head that their config describes."""

from __future__ import annotations

from typing import Any

from hf_ft.zoo.models import _short_image_model, _source
from hf_ft.zoo.short_names import SHORT_NAMES, short_name


def load_base(name: str, config: Any, loader: Any, revision: str | None = None, **hub: Any) -> tuple[Any, list[str]]:
    """A base model and the names of those of its parameters that are new and random.

    Args:
        name: a short name or the public name that stands for it in configs, a Hub id, or a folder.
        config: of the fine-tuned model; it gives the classes of the head.
        loader: class of Transformers that loads it.
        revision: branch, tag or commit on the Hub.
        hub: further options of its ``from_pretrained``.

    Raises:
        ImportError: if a short name's package is missing; the message contains the pip command.
    """
    short = short_name(name)
    if short and SHORT_NAMES[short].task == "image":
        labels = {key: getattr(config, key) for key in ("num_labels", "id2label", "label2id", "problem_type")}
        model = _short_image_model(short, labels, getattr(config, "image_size", None), keep=False)
        model.config.name_or_path = model.name_or_path = SHORT_NAMES[short].public_name
        return model.eval(), [f"classifier.{name}" for name, _ in model.classifier.named_parameters()]
    where, options = _source(name, {"revision": revision, **hub})
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = loader.from_pretrained(where, config=config, **options)
    mismatched = (entry[0] for entry in info.get("mismatched_keys", ()))
    return model, sorted(map(str, (*info.get("missing_keys", ()), *mismatched)))
