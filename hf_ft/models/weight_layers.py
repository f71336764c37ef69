"""The weight layers of a backbone, in order from the input, and the segments between poolings and activations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers.utils import logging

from hf_ft.models.anatomy import anatomy
from hf_ft.models.names import Names, covers, matches
from hf_ft.models.norms import norm_layers
from hf_ft.models.parts import Anatomy, Part

logger = logging.get_logger(__name__)

_POOLING = re.compile(r".*Pool(?:ing)?\w*")
_ACTIVATION = re.compile(r".*(?:ReLU\d?|[EGS]ELU|SiLU|Swish|Mish|Sigmoid|Tanh|Activation)", re.I)
# Inside a block: what carries the block's input past the main path, and what weights its channels.
_SHORTCUT = re.compile(r"\.(?:shortcut|downsample)\b")
_GATE = re.compile(r"\.(?:squeeze_excit\w*|se(?:_module|_layer)?|attention\.\d)\b")
# Classes in the module of torch's activations that are not activations: they weight their inputs.
_NO_ACTIVATION = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)


@dataclass(frozen=True)
class Layer:
    """A module with weights outside the head, together with the norm that follows it.

    Attributes:
        modules: names of the modules, and of loose parameters that belong to them.
        parameters: number of trainable parameters in them.
    """

    modules: Names
    parameters: int


@dataclass(frozen=True)
class PlacedLayer:
    """A layer, the part of :func:`~hf_ft.models.anatomy.anatomy` that contains it, and its segment number."""

    layer: Layer
    part: str
    segment: int


@dataclass
class _Draft:
    """A layer under construction; layers without trainable parameters are dropped at the end."""

    part: str
    weight: str
    modules: list[str] = field(default_factory=list)


def weight_layers(model: nn.Module, head: str | None = None, blocks: str | None = None) -> tuple[Layer, ...]:
    """The weight layers of a backbone from input to output, in definition order.

    A layer is a module with direct parameters that is not a normalisation: convolution, linear, embedding. It
    includes the norms defined after it; a norm at the start of a part (pre-norm) joins the layer that follows, and a
    neck that holds only norms joins the last layer. A loose parameter of a block (layer scale, the input projection
    of ``nn.MultiheadAttention``) belongs to the last layer of the module that holds it; a loose parameter of the stem
    (class token, learned positions) belongs to no layer.

    Limitations: definition order equals forward order except in branches. A ResNet's shortcut convolution counts as
    a layer before the main path of its block; Swin's position bias comes after the attention that reads it; ViT's
    pre-norm blocks define both norms after the attention, so they join its output projection.

    Args:
        model: model in its state before training: a layer whose parameters are all frozen does not count.
        head: see :func:`~hf_ft.models.anatomy.anatomy`.
        blocks: likewise.

    Raises:
        AnatomyError: if head or blocks cannot be found.
    """
    return tuple(placement.layer for placement in placed_layers(model, anatomy(model, head=head, blocks=blocks)))


def main_path_layers(model: nn.Module, head: str | None = None, blocks: str | None = None) -> tuple[Layer, ...]:
    """Like :func:`weight_layers`, but with everything off the main path merged into layers on it.

    A block's shortcut belongs to the block's first layer, since both read the block's input; a gate that weights
    channels (squeeze-and-excitation) belongs to the layer before it. A ResNet-50 has 49 such layers.
    """
    model_anatomy = anatomy(model, head=head, blocks=blocks)
    tops = {part.name: part.modules for part in model_anatomy.parts}
    layers: list[tuple[str, Layer]] = []
    waiting: list[Layer] = []  # shortcuts defined before anything else in their block
    for placement in placed_layers(model, model_anatomy):
        inside = _inside(placement, tops[placement.part])
        if not _SHORTCUT.search(inside) and not (_GATE.search(inside) and layers):
            layers.append((placement.part, _merged([*waiting, placement.layer])))
            waiting = []
        elif _GATE.search(inside):
            layers[-1] = (layers[-1][0], _merged([layers[-1][1], placement.layer]))
        elif (first := next((i for i, (part, _) in enumerate(layers) if part == placement.part), None)) is not None:
            layers[first] = (placement.part, _merged([placement.layer, layers[first][1]]))
        else:
            waiting.append(placement.layer)
    return tuple(layer for _, layer in layers)


def _inside(placed: PlacedLayer, tops: Names) -> str:
    """The path of a layer below the module of its part (patch merging, for example, is also called a downsample)."""
    name = placed.layer.modules[0]
    top = next((top for top in tops if covers(top, name)), "")
    return name.removeprefix(top) if top else name


def _merged(layers: list[Layer]) -> Layer:
    names = tuple(name for layer in layers for name in layer.modules)
    return Layer(names, sum(layer.parameters for layer in layers))


def placed_layers(model: nn.Module, found: Anatomy) -> tuple[PlacedLayer, ...]:
    """Every layer with its part and segment; segments are numbered in order, and some may be empty."""
    drafts = _drafts(model, found)
    sizes = trainable_sizes(model)
    cuts = _cuts(model, found, drafts)
    placements = []
    for index, draft in enumerate(drafts):
        size = size_of(draft.modules, sizes)
        if size:
            layer = Layer(tuple(draft.modules), size)
            placements.append(PlacedLayer(layer, draft.part, sum(cut < index for cut in cuts)))
    return tuple(placements)


def trainable_sizes(model: nn.Module) -> dict[str, int]:
    """Sizes of the trainable parameters by name; a shared one counts under its first name."""
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def size_of(modules: list[str] | Names, sizes: Mapping[str, int]) -> int:
    """The number of trainable parameters in these modules."""
    return sum(size for name, size in sizes.items() if any(covers(module, name) for module in modules))


def backbone_parts(found: Anatomy) -> tuple[Part, ...]:
    """Stem, blocks and neck."""
    return tuple(part for part in found.parts if part is not found.head)


def _drafts(model: nn.Module, found: Anatomy) -> list[_Draft]:
    # An activation with a parameter (PReLU) joins the layer before it, as a norm does.
    followers = {name for name, _ in norm_layers(model)}
    followers |= {name for name, module in model.named_modules() if _is_activation(module)}
    drafts: list[_Draft] = []
    waiting: list[str] = []  # norms before the first layer of their part
    modules = {name for name, _ in model.named_modules()}
    for part in backbone_parts(found):
        first = len(drafts)
        # Bare parameters between two blocks (a class token that joins late) belong to the part's last layer.
        loose = [(name.rpartition(".")[0], [name]) for name in part.modules if name not in modules]
        for name, module in _walk(model, part):
            own = [f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)]
            if not own or (len(drafts) > first and matches(name, drafts[-1].modules)):
                continue
            if name in followers:
                (drafts[-1].modules if len(drafts) > first else waiting).append(name)
            elif _holds_weights(name, module, followers):
                loose.append((name, own))
            else:
                drafts.append(_Draft(part.name, name, [*waiting, name]))
                waiting = []
        if part is not found.stem:
            _place_loose(loose, drafts[first:])
        if waiting and drafts:
            drafts[-1].modules += waiting
            waiting = []
    return drafts


def _walk(model: nn.Module, part: Part) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    for top in part.modules:
        if top in modules:  # a stem may hold bare parameters
            yield from modules[top].named_modules(prefix=top)


def _holds_weights(name: str, module: nn.Module, followers: set[str]) -> bool:
    """Whether a module's children have weights: its direct parameters are loose then; otherwise it is a layer."""
    return any(
        next(child.parameters(recurse=False), None) is not None
        for inner, child in module.named_modules(prefix=name)
        if inner != name and inner not in followers
    )


def _place_loose(loose: list[tuple[str, list[str]]], drafts: list[_Draft]) -> None:
    """Assign a container's parameters to the last layer in it: a layer scale multiplies that layer's output."""
    for container, names in loose:
        inside = [draft for draft in drafts if matches(draft.weight, [container])]
        for last in (inside or drafts)[-1:]:
            last.modules += names


# --- segments ---------------------------------------------------------------------------------------------


def _cuts(model: nn.Module, found: Anatomy, drafts: list[_Draft]) -> set[int]:
    """Indices of the layers after which a segment ends."""
    owner = {draft.weight: index for index, draft in enumerate(drafts)}
    cuts: set[int] = set()
    current: int | None = None
    for name, module in model.named_modules():  # not by part: a pooling next to the blocks is in none of them
        if matches(name, found.head.modules):
            continue
        current = owner.get(name, current)
        if _separates(module):
            inside = _layer_before(model, name, owner) if _is_activation(module) else None
            after = current if inside is None else inside
            cuts |= set() if after is None else {after}
    if lacks_separators(model, found):
        cuts |= {i for i, (a, b) in enumerate(itertools.pairwise(drafts)) if a.part != b.part}
    return cuts


def lacks_separators(model: nn.Module, found: Anatomy) -> bool:
    """Whether the blocks have neither pooling nor activation modules, which means that they call functions instead."""
    return not any(_separates(module) for part in found.blocks for _, module in _walk(model, part))


def _layer_before(model: nn.Module, name: str, owner: Mapping[str, int]) -> int | None:
    """The layer before an activation, in a module that defines its activations all before or all after its layers.

    Transformers defines an MLP as ``activation_fn, fc1, fc2`` (ViT, Swin) or ``lin1, lin2, activation`` (DistilBERT),
    and a gate as ``reduce, expand, act_reduce, act_expand`` (EfficientNet): the n-th activation follows the n-th layer.
    """
    prefix, _, last = name.rpartition(".")
    parent = model.get_submodule(prefix)
    if isinstance(parent, nn.Sequential):
        return None  # its modules are defined in the order in which they run
    children = list(parent.named_children())
    layers = [i for i, (child, _) in enumerate(children) if f"{prefix}.{child}" in owner]
    activations = [i for i, (_, child) in enumerate(children) if _is_activation(child)]
    mixed = any(layers[0] < i < layers[-1] for i in activations) if layers else True
    if mixed or len(layers) < 2 or len(activations) not in (len(layers) - 1, len(layers)):
        return None
    nth = [children[i][0] for i in activations].index(last)
    return owner[f"{prefix}.{children[layers[nth]][0]}"]


def _separates(module: nn.Module) -> bool:
    return is_pooling(module) or _is_activation(module)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def is_pooling(module: nn.Module) -> bool:
    """Whether a module pools and has no weights."""
    has_weights = next(module.parameters(), None) is not None
    return _is_leaf(module) and not has_weights and _POOLING.fullmatch(type(module).__name__) is not None


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    if not _is_leaf(module) or isinstance(module, _NO_ACTIVATION):
        return False
    in_library = kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return in_library or _ACTIVATION.fullmatch(kind.__name__) is not None
