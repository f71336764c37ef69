"""A single processor for ensemble members that normalise, resize or tokenise differently.

Members with equivalent processors share one tensor. The tensor of the first distinct processor keeps its plain name
(``pixel_values``); those of the others get a number (``pixel_values_1``): see :func:`column`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.utils import IMAGE_PROCESSOR_NAME, PushToHubMixin, cached_file

from hf_ft.errors import CheckpointError, OptionError

TOKENIZERS_NAME = "collaborative_tokenizer.json"
TYPE = "image_processor_type"
# The place a processor was read from, or the class that reads it, does not change its behaviour.
_ORIGINS = {"_processor_class", "processor_class", "feature_extractor_type", "auto_map", "name_or_path"}
_ORIGINS |= {"_name_or_path", "vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "is_local"}
_TEXT_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "special_tokens_map")


def column(name: str, index: int) -> str:
    """The batch column of a tensor produced by the distinct processor with this index."""
    return name if index == 0 else f"{name}_{index}"


def distinct(processors: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The processors that differ in class, settings or vocabulary, and the index into these for each given processor.

    Raises:
        OptionError: if one is missing or of another kind, or if image processors and tokenizers are mixed.
    """
    _same_kind(processors, BaseImageProcessor, PreTrainedTokenizerBase)
    identities = [_identity(processor) for processor in processors]
    first = [identities.index(identity) for identity in identities]
    own = sorted(set(first))
    return [processors[index] for index in own], [own.index(index) for index in first]


def combined(processors: Sequence[Any]) -> Any:
    """Combine the members' processors: the processor itself if all share one, else a collaborative one.

    Raises:
        OptionError: see :func:`distinct`.
    """
    parts, _ = distinct(processors)
    kind: Any = CollaborativeTokenizer if isinstance(parts[0], PreTrainedTokenizerBase) else CollaborativeImageProcessor
    return parts[0] if len(parts) == 1 else kind(parts)


def of_members(processor: Any, inputs: Sequence[int]) -> list[Any]:
    """Each member's own processor, out of the one that serves all; empty if that does not fit the members.

    Args:
        inputs: for each member, the index of its distinct processor.
    """
    parts = getattr(processor, "processors", None) or getattr(processor, "tokenizers", None) or [processor]
    return [parts[index] for index in inputs] if len(parts) == len(set(inputs)) else []


class CollaborativeImageProcessor(BaseImageProcessor):
    """Several image processors as one: each image is opened once and yields one tensor per processor.

    Saved and loaded like any image processor, in a single ``preprocessor_config.json``; ``AutoImageProcessor`` can
    load it once ``hf_ft`` is imported.

    Args:
        processors: the image processors, or the dicts of their ``to_dict``, from which only Transformers' own
            classes are built.
        options: settings that override those of processors given as dicts (``size``, ...).

    Raises:
        OptionError: if a processor is missing or cannot be built.
    """

    def __init__(self, processors: Sequence[Any], **options: Any) -> None:
        super().__init__()
        options.pop(TYPE, None)
        self.processors = [
            _built({**part, **options}, index) if isinstance(part, Mapping) else part
            for index, part in enumerate(processors)
        ]
        _same_kind(self.processors, BaseImageProcessor)
        self.model_input_names = _input_names(self.processors)

    def preprocess(self, images: Any, *args: Any, **options: Any) -> BatchFeature:
        """Process images with every processor.

        Args:
            images: one or several images, arrays, paths or URLs, as for any image processor.
            options: passed to every processor (``return_tensors``, ...).

        Returns:
            ``pixel_values`` (B, C, H_0, W_0), ``pixel_values_1`` (B, C, H_1, W_1), ...
        """
        inputs = self.fetch_images(images)
        return BatchFeature(_joined(part(inputs, *args, **options) for part in self.processors))

    def to_dict(self) -> dict[str, Any]:
        """The JSON content: the name of this class, and the dict of each processor."""
        return {TYPE: type(self).__name__, "processors": [part.to_dict() for part in self.processors]}

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the content of the file in a folder or on the Hub.

        Raises:
            CheckpointError: if it is missing, damaged or incomplete.
        """
        where = f"{pretrained_model_name_or_path}/{IMAGE_PROCESSOR_NAME}"
        fix = "Restore it, or save it again: combined(processors).save_pretrained(...)."
        try:
            content, rest = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read ({error}). {fix}") from error
        parts = content.get("processors") if isinstance(content, dict) else content
        for part in parts if parts and isinstance(parts, list) else [parts]:
            if not isinstance(part, dict) or TYPE not in part:
                raise CheckpointError(
                    f"{where}: 'processors' contains {part!r}, not settings with their {TYPE!r}. {fix}"
                )
        return content, rest


# AutoImageProcessor finds a class by its name among all registered classes, so any key will do. In some versions its
# own `register` cannot be called without torchvision.
_known: Any = IMAGE_PROCESSOR_MAPPING
_known.register(
    CollaborativeImageProcessor, dict.fromkeys(("pil", "torchvision"), CollaborativeImageProcessor), exist_ok=True
)


class CollaborativeTokenizer(PushToHubMixin):
    """Several tokenizers as one: each text yields the tensors of every tokenizer.

    ``AutoTokenizer`` does not support it: load it with ``CollaborativeTokenizer.from_pretrained(folder)``, and pass
    the object to a pipeline, ``pipeline("text-classification", model=model, tokenizer=tokenizer)``.

    Raises:
        OptionError: if an element is missing or is not a tokenizer.
    """

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        _same_kind(tokenizers, PreTrainedTokenizerBase)
        self.tokenizers = list(tokenizers)
        self.model_input_names = _input_names(self.tokenizers)

    def __call__(self, *texts: Any, **options: Any) -> BatchEncoding:
        """Tokenise texts or pairs of texts, with the options of any tokenizer.

        Returns:
            ``input_ids`` (B, T_0), ``attention_mask`` (B, T_0), ..., ``input_ids_1`` (B, T_1), ...
        """
        return BatchEncoding(_joined(part(*texts, **options) for part in self.tokenizers))

    def pad(self, features: Any, padding: Any = True, **options: Any) -> BatchEncoding:
        """Pad each tokenizer's columns with that tokenizer; other columns, such as labels, are kept.

        Args:
            features: a list of rows, or a dict of columns.

        Raises:
            OptionError: if the columns of a tokenizer are missing.
        """
        outputs = []
        for index, part in enumerate(self.tokenizers):
            own = _of_part(features, index, len(self.tokenizers))
            if (name := part.model_input_names[0]) not in (own if isinstance(own, Mapping) else own[0]):
                raise OptionError(
                    f"the rows have no {column(name, index)!r}: prepare them with this tokenizer, and set "
                    "remove_unused_columns=False so that it is not dropped."
                )
            outputs.append(pad_without_fast_tokenizer_warning(part, own, padding=padding, **options))
        return BatchEncoding(_joined(outputs))

    @property
    def model_max_length(self) -> int:
        """The longest input that every tokenizer accepts, in tokens."""
        return min(part.model_max_length for part in self.tokenizers)

    @property
    def pad_token_id(self) -> int | None:
        """The padding token id of the first tokenizer."""
        return self.tokenizers[0].pad_token_id

    @property
    def padding_side(self) -> str:
        """The common padding side. Pipelines read it to build batches, and pad all but the first tokenizer's with 0.

        Raises:
            OptionError: if the tokenizers cannot be padded this way.
        """
        sides = [part.padding_side for part in self.tokenizers]
        tokens = [part.pad_token_id for part in self.tokenizers[1:]]
        if len(set(sides)) > 1 or any(token != 0 for token in tokens):
            raise OptionError(
                "a pipeline pads all texts on one side, and with 0 for all but the first tokenizer; these pad on "
                f"{sides} and with {tokens}. Use batch_size=1, or call tokenizer(texts, padding=True) and the model."
            )
        return sides[0]

    def save_pretrained(self, save_directory: str | Path, max_shard_size: Any = None) -> tuple[str, ...]:
        """Save each tokenizer to ``tokenizer_0``, ..., and an index of their files; return all files.

        Args:
            max_shard_size: no effect; ``push_to_hub`` passes it to any object it saves.
        """
        top = Path(save_directory, TOKENIZERS_NAME)
        files = [part.save_pretrained(str(top.parent / f"tokenizer_{i}")) for i, part in enumerate(self.tokenizers)]
        content = {"tokenizers": [[Path(file).name for file in paths] for paths in files]}
        top.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return (*(file for paths in files for file in paths), str(top))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> CollaborativeTokenizer:
        """Load what :meth:`save_pretrained` saved, from a folder or the Hub; runs no code from there.

        Raises:
            CheckpointError: if a file is missing or damaged.
        """
        name = str(pretrained_model_name_or_path)
        where, parts = f"{name}/{TOKENIZERS_NAME}", []
        try:
            content = json.loads(Path(str(cached_file(name, TOKENIZERS_NAME, **hub))).read_text(encoding="utf-8"))
            for index, files in enumerate(content["tokenizers"]):
                options = {"subfolder": f"tokenizer_{index}", **hub}
                for file in files:  # without a file, AutoTokenizer would continue with an empty vocabulary
                    where = f"{name}/tokenizer_{index}/{file}"
                    cached_file(name, file, **options)
                where = f"{name}/tokenizer_{index}"
                parts.append(AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options))
            return cls(parts)
        except Exception as error:  # the tokenizers package raises nothing more specific
            fix = "Restore it, or save all again: combined(tokenizers).save_pretrained(...)."
            raise CheckpointError(f"{where} is missing or damaged ({error}). {fix}") from error


def _same_kind(processors: Sequence[Any], *kinds: type) -> None:
    if not processors:
        raise OptionError("processors=[] is empty: each member needs one.")
    for index, processor in enumerate(processors):
        if processor is None:
            raise OptionError(
                f"processors[{index}] is None: member {index} has no image processor or tokenizer. Use one that fits "
                "its model (AutoImageProcessor or AutoTokenizer), or save one to the member's folder."
            )
        if not isinstance(processor, kinds) or isinstance(processor, CollaborativeImageProcessor):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise OptionError(f"processors[{index}] is a {type(processor).__name__}: give a plain {names}.")
    if len({isinstance(processor, PreTrainedTokenizerBase) for processor in processors}) > 1:
        names = ", ".join(type(processor).__name__ for processor in processors)
        raise OptionError(f"processors={names}: image processors and tokenizers are mixed. Use members of one kind.")


def _identity(processor: Any) -> tuple[Any, ...]:
    if not isinstance(processor, PreTrainedTokenizerBase):
        options = json.loads(processor.to_json_string())
        return type(processor), {key: value for key, value in options.items() if key not in _ORIGINS}
    settings = [getattr(processor, name) for name in _TEXT_SETTINGS]
    if (backend := getattr(processor, "backend_tokenizer", None)) is None:
        options = {key: value for key, value in processor.init_kwargs.items() if key not in _ORIGINS}
        return type(processor), settings, processor.get_vocab(), options
    content = json.loads(backend.to_str())
    del content["truncation"], content["padding"]  # left over from the last call
    return type(processor), settings, content


def _built(content: Mapping[str, Any], index: int) -> Any:
    """Build an image processor from its dict, by the rules by which Transformers reads such a file."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, IMAGE_PROCESSOR_NAME).write_text(json.dumps(content), encoding="utf-8")
        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a name that is not an image processor fails in many ways
            why = str(error).strip().partition(".")[0]
            raise OptionError(
                f"processors[{index}] is a {content.get(TYPE)!r}, which cannot be created here ({why}): install the "
                "version of Transformers or the package that has it, or use another processor."
            ) from error


def _input_names(parts: Sequence[Any]) -> list[str]:
    return [column(name, index) for index, part in enumerate(parts) for name in part.model_input_names]


def _joined(outputs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {column(name, index): value for index, output in enumerate(outputs) for name, value in output.items()}


def _of_part(features: Any, index: int, parts: int) -> Any:
    """The columns of one processor under their plain names; columns of no processor go to the first."""
    if not isinstance(features, Mapping):
        return [_of_part(row, index, parts) for row in features]
    columns = {}
    for name, value in features.items():
        plain, _, number = name.rpartition("_")
        numbered = number.isdecimal() and 0 < int(number) < parts
        if (int(number) if numbered else 0) == index:
            columns[plain if numbered else name] = value
    return columns
