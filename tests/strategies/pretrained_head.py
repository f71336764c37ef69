"""The logits of a pretrained head on a network, by the network's own forward pass with that head in place."""

import copy

import torch


@torch.no_grad()
def logits_with(model, head, inputs):
    """Source logits, (B, C_s), in evaluation mode; the arguments are not changed."""
    network = copy.deepcopy(model).eval()
    for path, module in head.modules_by_path.items():
        network.set_submodule(path, copy.deepcopy(module).eval())
    return network(**{name: value for name, value in inputs.items() if name != "labels"}).logits
