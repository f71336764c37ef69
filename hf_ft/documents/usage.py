"""The code that uses a saved classifier, for console, report and card."""

from __future__ import annotations

from pathlib import Path


def pipeline_usage(
    folder: str | Path,
    task: str,
    example: str | Path | None = None,
    *,
    ensemble: bool = False,
    tokenizers: bool = False,
) -> str:
    """How to classify with Transformers alone.

    Args:
        task: ``image``, ``text`` or ``audio``.
        example: what to classify.
        ensemble: whether it is an ensemble, which importing ``hf_ft`` registers with Transformers.
        tokenizers: whether its members have several tokenizers, which ``AutoTokenizer`` cannot load.
    """
    given = example or {"image": "photo.png", "audio": "sound.wav"}.get(task, "some text")
    tokenizer = f', tokenizer=hf_ft.CollaborativeTokenizer.from_pretrained("{folder}")' if tokenizers else ""
    return "\n".join(
        [
            *(["import hf_ft  # registers the ensemble with Transformers"] if ensemble else []),
            "from transformers import pipeline",
            "",
            f'classify = pipeline("{task}-classification", model="{folder}"{tokenizer})',
            f'print(classify("{given}"))',
        ]
    )
