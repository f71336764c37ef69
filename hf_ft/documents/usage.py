"""Code that uses a saved classifier, for console, report and card."""

from __future__ import annotations

from pathlib import Path


def pipeline_usage(
    folder: str | Path,
    task: str,
    example: str | Path | None = None,
    *,
    registers: str = "",
    tokenizers: bool = False,
) -> str:
    """How to classify with Transformers alone.

    Args:
        task: ``image``, ``text`` or ``audio``.
        example: what to classify.
        registers: what the model is, if Transformers knows it only after ``hf_ft`` is imported: ``"the ensemble"``.
        tokenizers: whether its members have several tokenizers, which ``AutoTokenizer`` cannot load.
    """
    given = example or {"image": "photo.png", "audio": "sound.wav"}.get(task, "some text")
    tokenizer = f', tokenizer=hf_ft.CollaborativeTokenizer.from_pretrained("{folder}")' if tokenizers else ""
    return "\n".join(
        [
            *([f"import hf_ft  # registers {registers} with Transformers"] if registers else []),
            "from transformers import pipeline",
            "",
            f'classify = pipeline("{task}-classification", model="{folder}"{tokenizer})',
            f'print(classify("{given}"))',
        ]
    )


def adapter_usage(folder: str | Path, kind: str = "", base: str | None = None) -> str:
    """How to load the PEFT adapter of a classifier: with ``hf_ft``, and if its base is known, with PEFT alone.

    Args:
        kind: name of the base's class.
        base: Hub id or folder of the base.
    """
    lines = ["from hf_ft.inference import load_trained", "", f'model = load_trained("{folder}").model']
    if base is not None:
        lines += [
            "",
            "# With PEFT alone: the base gets a head for these classes, which that of the adapter then replaces.",
            "# (BatchNorm statistics stay those of the base.)",
            "from peft import PeftModel",
            f"from transformers import AutoConfig, {kind}",
            "",
            f'config = AutoConfig.from_pretrained("{folder}")',
            f'base = {kind}.from_pretrained("{base}", config=config, ignore_mismatched_sizes=True)',
            f'model = PeftModel.from_pretrained(base, "{folder}")',
        ]
    return "\n".join(lines)
