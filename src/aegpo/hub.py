"""A run on the Hub: what of its folder is published there, and without whose paths."""

import json
import shlex
import sys
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from aegpo.config import reward_terms
from aegpo.report import model_card, shown_pictures

RECORDS = ("env.json", "metrics.jsonl")
LORA = "pytorch_lora_weights.safetensors"
NETWORK: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)  # and whatever client it goes by


def check(repo: str) -> None:
    """See whether the Hub would take a run of ours there, as far as can be said without writing.

    Raises:
        ValueError: the repository is not named as one, or there is no token, or none that may write.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} cannot be the name of a repository on the Hub: {error}") from None
    if "/" not in repo:
        raise ValueError(f"{repo!r} is not a repository on the Hub; give it as USER/NAME")
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ValueError("there is no token for the Hub; log in with: hf auth login") from None
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub does not take the token: {_said(error)}; log in with: hf auth login") from None
    except NETWORK as error:
        raise ValueError(f"the Hub cannot be reached: {_said(error)}") from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("the token for the Hub may only read; log in with one that may write: hf auth login")


def push(run: Path, repo: str, private: bool = False) -> str:
    """Publish a run: its weights, its card with the pictures that it shows, its settings, versions and metrics.

    Args:
        run: its folder.
        repo: USER/NAME, which is made if there is none.
        private: whether nobody else may see it.

    Returns:
        Its address.

    Raises:
        ValueError: the run has no weights yet, the repository is public and should be private, or the Hub could not be
            reached or refused.
    """
    content = published(run, repo)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ValueError(f"{repo} is public already; make it private on the Hub, or give another name")
        api.create_commit(
            repo,
            [CommitOperationAdd(name, file) for name, file in content.items()],
            commit_message="Add a run of aegpo",
        )
    except NETWORK as error:
        again = f"aegpo push {shlex.quote(str(run))} {repo}" + " --private" * private
        raise ValueError(f"run {run} is whole, but was not pushed: {_said(error)}; to push it again: {again}") from None
    return str(address)


def published(run: Path, repo: str) -> dict[str, Path | bytes]:
    """What of a run's folder goes to the Hub, by its name there, and nothing else; raises ValueError as `push` does."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    card = model_card(run, repo)
    names = [
        *_weights(run, settings),
        *shown_pictures(run.resolve()),
        *(name for name in RECORDS if (run / name).is_file()),
    ]
    content: dict[str, Path | bytes] = {"README.md": card.encode()}
    content["config.yaml"] = yaml.safe_dump(_without_folders(settings), sort_keys=False).encode()
    content |= {name: _public(run / name) for name in names}
    if "metrics.jsonl" in content:
        content["metrics.jsonl"] = _named_shortly(
            (run / "metrics.jsonl").read_text(encoding="utf-8"), settings
        ).encode()
    return content


def _named_shortly(metrics: str, settings: dict[str, Any]) -> str:
    """Metrics without what rewards said of errors, in which they go by the last part of their path, as in settings."""
    names = sorted(reward_terms(settings.get("reward", "world")), key=len, reverse=True)

    def public(line: str) -> str:
        row = json.loads(line)
        if "reward_troubles" not in row and not any(f"/{name}" in line for name in names):
            return line
        for trouble in row.get("reward_troubles", ()):
            del trouble["what"]
            trouble["reward"] = _without_folders(trouble["reward"])
        short = {name: _without_folders(name) for name in names}
        return json.dumps({_replaced(key, short): value for key, value in row.items()})

    return "".join(f"{public(line)}\n" for line in metrics.splitlines())


def _replaced(key: str, short: dict[str, str]) -> str:
    return next((key.replace(name, short[name]) for name in short if f"/{name}" in key), key)


def _weights(run: Path, settings: dict[str, Any]) -> list[str]:
    """The adapter's file, or those of the pipeline."""
    is_full = settings.get("model", {}).get("train") == "full"
    first = run / ("model_index.json" if is_full else LORA)
    if not first.is_file():
        raise ValueError(f"run {run} has no weights yet: {first.name} is missing")
    if not is_full:
        return [LORA]
    parts = [run / name for name in json.loads(first.read_text(encoding="utf-8")) if not name.startswith("_")]
    files = [file for part in parts for file in sorted(part.rglob("*")) if file.is_file()]
    return [first.name, *(file.relative_to(run).as_posix() for file in files)]


def _public(file: Path) -> Path | bytes:
    """The file; but if diffusers noted in it from which folder it was loaded, its content without that."""
    if file.name not in ("model_index.json", "config.json"):
        return file
    content = json.loads(file.read_text(encoding="utf-8"))
    public = _without_folders(content)
    return file if public == content else (json.dumps(public, indent=2) + "\n").encode()


def _without_folders(value: Any) -> Any:
    """Settings in which a path that leads elsewhere is but its last part: the folders above are nobody's business."""
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(inner) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")  # as in pickscore=/models/pickscore
    if path.startswith(("http://", "https://")):  # of a server
        return name or "URL"
    leads_away = PurePath(path).is_absolute() or PurePath(path).parts[:1] == ("~",) or ".." in PurePath(path).parts
    return f"{name}{equals}{PurePath(path).name}" if leads_away else value


def _said(error: Exception) -> str:
    """What an error of the network says, on one line and without the token, which a client may quote."""
    said = " ".join(str(error).split()) or type(error).__name__
    token = get_token()
    return said.replace(token, "...") if token else said
