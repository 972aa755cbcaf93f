"""What `aegpo reward-server` and the reward `remote` have agreed on: bodies, scores in JSON, the token."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

TOKEN = "AEGPO_REWARD_TOKEN"  # the environment variable that may hold it
SAFETENSORS = "application/x-safetensors"


def packed(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], id: str) -> bytes:
    """A request as safetensors: the tensor `images`, and in the header's metadata prompts, metadata (JSON) and id.

    Raises:
        TypeError: the metadata is nothing that JSON has.
    """
    header = {"prompts": json.dumps(list(prompts)), "metadata": json.dumps(list(metadata)), "id": id}
    return save({"images": np.ascontiguousarray(images)}, header)


def spelled(score: np.ndarray) -> list[float | str]:
    """Scores as JSON has them, to the bit; of what it has no numbers for, it has the words "nan", "inf" and "-inf"."""
    return [value if np.isfinite(value) else str(value) for value in score.tolist()]


def read_token(file: str | None) -> str | None:
    """The token that a file holds, else the environment's, else none; no error tells what it is.

    Raises:
        ValueError: the file cannot be read, or what there is cannot be a token.
    """
    try:
        token = os.environ.get(TOKEN) if file is None else Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"the token file {file} cannot be read: {why}") from None
    if token is not None and not (token and all("!" <= letter <= "~" for letter in token)):
        where = TOKEN if file is None else f"the token file {file}"
        raise ValueError(f"{where} should hold a token, letters, digits and signs of ASCII without a space among them")
    return token


def public(name: str) -> str:
    """A reward's name without the folders that stand in it, which are nobody's business."""
    return re.sub(r"[^=]*/", "", name)
