"""The blocks that a network of diffusers repeats: what is compiled, and whose weights are kept in few bits."""

from typing import Any

from torch import nn


def repeated(network: Any) -> dict[str, nn.Module]:
    """The repeated blocks by name, none within another, as diffusers itself lists their classes."""
    kinds, found, within = network._repeated_blocks or network._no_split_modules, {}, None
    for name, module in network.named_modules():
        if type(module).__name__ in kinds and not (within and name.startswith(f"{within}.")):
            within, found[name] = name, module
    return found
