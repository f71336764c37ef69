"""What a pretrained head makes of a network, by the network itself: its own forward, with the head put in for good."""

import copy

import torch


@torch.no_grad()
def logits_with(model, head, inputs):
    """Source logits (B, C_s) in evaluation mode; nothing that is given changes."""
    network = copy.deepcopy(model).eval()
    for path, module in head.modules_by_path.items():
        network.set_submodule(path, copy.deepcopy(module).eval())
    return network(**{name: value for name, value in inputs.items() if name != "labels"}).logits
