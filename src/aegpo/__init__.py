"""Align diffusion and flow models with human preference by online reinforcement learning."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("aegpo")

_PUBLIC = {
    "Config": "aegpo.config",
    "resolve": "aegpo.config",
    "run": "aegpo.build",
    "sample": "aegpo.use",
    "evaluate": "aegpo.use",
    "analyze": "aegpo.use",
    "train": "aegpo.train",
    "collect": "aegpo.rollout",
    "probe": "aegpo.rollout",
    "allocate": "aegpo.adapt.allocation",
    "explore": "aegpo.adapt.exploration",
    "transition": "aegpo.math.transitions",
    "log_prob": "aegpo.math.transitions",
    "group_advantages": "aegpo.math.advantages",
    "clipped_surrogate": "aegpo.math.losses",
    "attention_entropy": "aegpo.math.entropy",
    "write_report": "aegpo.report",
}
__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import aegpo` and `aegpo --help` stay light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'aegpo' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
