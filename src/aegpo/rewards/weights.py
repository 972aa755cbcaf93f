"""Where a scorer's files come from: the Hub or a folder. Weights are safetensors; nothing is unpickled."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

BATCH = 32  # pictures, or prompts, that go through a network at once


@dataclass(frozen=True)
class Source:
    """The files of one scorer.

    Attributes:
        reward: its name.
        weights: where the Hub has the weights.
        rest: where it has the tokenizer, and the config if there is one.
        folder: one that holds all of this instead, the weights as its only .safetensors.
    """

    reward: str
    weights: str
    rest: str
    folder: str | None = None

    @property
    def place(self) -> tuple[str, ...]:
        """Where the files are: the same for two sources of the same files."""
        return (str(Path(self.folder).resolve()),) if self.folder else (self.weights, self.rest)

    def tensors(self) -> dict[str, Tensor]:
        """The weights, by the names they have there, without buffers of positions.

        Raises:
            ValueError: they cannot be had.
        """
        with self.reading(self.weights):
            file = self._only_file() if self.folder else cached_file(self.weights, "model.safetensors")
            tensors = load_file(str(file))
        return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}

    def config(self, kind: Any) -> Any:
        """The config of that class of transformers; raises ValueError where it cannot be had."""
        with self.reading(self.rest):
            file = cached_file(self.folder or self.rest, "config.json")
            if file is None:
                raise ValueError("it has no config.json")
            return kind.from_json_file(file)

    def tokenizer(self, kind: Any, size: int, added: tuple[str, ...] = ()) -> Any:
        """The tokenizer of that class of transformers, with special tokens added.

        Raises:
            ValueError: it cannot be had, or knows another number of tokens than `size`, which the weights do.
        """
        with self.reading(self.rest):
            tokenizer = kind.from_pretrained(self.folder or self.rest)
        tokenizer.add_tokens(list(added), special_tokens=True)
        if len(tokenizer) != size:
            raise ValueError(
                f"reward: {self.reward}: the tokenizer of {self.folder or self.rest} knows {len(tokenizer):,} tokens, "
                f"and the weights know {size:,}; its files are missing or another model's"
            )
        return tokenizer

    def model(self, kind: Any, config: Any, tensors: dict[str, Tensor], **options: Any) -> Any:
        """The model of that class of transformers with these weights, in float32, on a GPU if there is one.

        Raises:
            ValueError: a weight is missing, of another shape, or has no place in the model.
        """
        with torch.device("meta"):
            due = {name: weight.shape for name, weight in kind(config, **options).state_dict().items()}
        self.check(tensors, due)
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32, **options)
        return model.eval().requires_grad_(False).to(device())

    def check(self, tensors: dict[str, Tensor], due: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError where a weight is missing, of another shape than is due, or not due at all."""
        given = {name: weight.shape for name, weight in tensors.items()}
        if wrong := sorted(name for name in due.keys() | given.keys() if due.get(name) != given.get(name)):
            raise ValueError(
                f"reward: {self.reward}: the weights of {self.folder or self.weights} do not fit: {len(wrong)} of them "
                f"are missing, too many or of another shape, the first {wrong[0]}"
            )

    @contextmanager
    def reading(self, repository: str) -> Iterator[None]:
        """Make of whatever goes wrong one line of a ValueError."""
        try:
            yield
        except Exception as error:  # of the Hub, the network or a file's format: each has its own kinds
            reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            if self.folder:
                raise ValueError(f"reward: {self.reward}={self.folder} cannot be used: {reason}") from error
            raise ValueError(
                f"reward: {self.reward} needs {repository} of the Hub, which cannot be had: {reason}; "
                f"a folder that holds its files is given as {self.reward}=FOLDER"
            ) from error

    def _only_file(self) -> Path:
        folder = Path(str(self.folder))
        if not folder.is_dir():
            raise ValueError("there is no such folder")
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"it must hold the weights as one .safetensors, and holds {len(found)}")
        return found[0]


def device() -> torch.device:
    """Where scorers compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
