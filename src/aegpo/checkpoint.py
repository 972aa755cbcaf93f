"""Save and resume: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

Noise and the draw of prompts are keyed by seed and step, and the generators that others may draw from are seeded by
them at each step, so there is no state of a generator to save, and the step is the position in the data.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aegpo import disk
from aegpo.distributed import part_of, whole

NEEDED = ("memory.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors")  # of any checkpoint
AVERAGE, BEHAVIOUR = "average.safetensors", "behaviour.safetensors"  # of some
MOMENTS = {"exp_avg", "exp_avg_sq"}  # what AdamW keeps in a weight's own shape


def content(
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
    behaviour: Sequence[Tensor] | None,
    memory: Mapping[str, Tensor],
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, by file and name; those of which each process holds a part are put together."""
    files = {"weights": weights, "optimizer": _optimizer_tensors(weights, optimizer), "memory": memory}
    if average is not None and average.optimization_step:  # until then, the weights are their own average
        files["average"] = dict(zip(weights, average.shadow_params, strict=True))
    if behaviour is not None:
        files["behaviour"] = dict(zip(weights, behaviour, strict=True))
    return {
        f"{file}.safetensors": {name: whole(tensor.detach()).contiguous() for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }


def save(
    run: Path, step: int, files: Mapping[str, dict[str, Tensor]], counters: Mapping[str, Any], limit: int = 2
) -> Path:
    """Write `checkpoint-STEP` into the run's folder, whole or not at all, and drop all but the newest `limit`.

    It is on the disk, whatever happens to the machine, before an older one is dropped. Where it cannot be written,
    nothing of it is left and no older one is touched.
    """
    final = run / f"checkpoint-{step}"
    aside = run / f".checkpoint-{step}.partial"
    sweep(run)
    aside.mkdir()
    try:
        with disk.writing(final):
            for name, tensors in files.items():
                save_file(tensors, aside / name)
        (aside / "state.json").write_text(json.dumps({"step": step, **counters}))
        digests = {file.name: _digest(file) for file in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(digests, indent=1))
        disk.sync_all(aside)
        if final.exists():
            disk.delete(final)
        aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    disk.sync(run)
    for old in checkpoints(run)[:-limit]:
        disk.delete(old)
    return final


def load(
    folder: Path,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
    behaviour: Sequence[Tensor] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint, which `verify` has found whole, back into the model and the optimizer.

    Returns:
        The counters (with `step`), and the memory's tensors.

    Raises:
        ValueError: it belongs to a model with other trained weights.
    """
    refuse_others(folder, weights)
    saved = load_file(folder / "weights.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in weights.items():
        _fill(parameter, saved[name])
        optimizer.state[parameter] = {
            key.removeprefix(f"{name}/"): _restored(key, moment, optimizer, parameter)
            for key, moment in moments.items()
            if key.rpartition("/")[0] == name
        }
    state = json.loads((folder / "state.json").read_text())
    if average is not None and state["average_steps"]:
        shadow = load_file(folder / "average.safetensors")
        average.shadow_params = [part_of(shadow[name], p) for name, p in weights.items()]
        average.optimization_step = state["average_steps"]
    if behaviour is not None:
        drew = folder / "behaviour.safetensors"
        drew = load_file(drew) if drew.exists() else saved  # a run that had none goes on from the policy itself
        for name, tensor in zip(weights, behaviour, strict=True):
            _fill(tensor, drew[name])
    return state, load_file(folder / "memory.safetensors")


def load_weights(folder: Path, weights: Mapping[str, nn.Parameter]) -> None:
    """Read only the policy's weights, averaged if the run averages; see `load`."""
    refuse_others(folder, weights)
    average = folder / "average.safetensors"
    saved = load_file(average if average.exists() else folder / "weights.safetensors")
    for name, parameter in weights.items():
        _fill(parameter, saved[name])


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted((folder for folder in run.glob("checkpoint-*") if step_of(folder) >= 0), key=step_of)


def step_of(folder: Path) -> int:
    """The training step that a folder of this name, `checkpoint-STEP`, stands for; -1 for any other name."""
    name = re.fullmatch("checkpoint-([0-9]+)", folder.name)
    return int(name[1]) if name else -1


def last_step(run: Path) -> int:
    """The training step of the run's newest checkpoint; -1 where it has none."""
    return max(map(step_of, checkpoints(run)), default=-1)


def drop_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the run goes on from `step`, and they are of a course it leaves."""
    sweep(run)
    for folder in reversed(checkpoints(run)):  # so that, however far it came, what is left is of one course
        if step_of(folder) > step:
            disk.delete(folder)


def sweep(run: Path) -> None:
    """Delete what is left of checkpoints that were being written, or deleted, when a run was killed."""
    for name in (".checkpoint-*.partial", ".checkpoint-*.old"):
        for folder in run.glob(name):
            shutil.rmtree(folder)


def newest_whole(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with each later one.

    Raises:
        ValueError: there is none; all that are damaged are named.
    """
    damaged: list[str] = []
    for folder in reversed(checkpoints(run)):
        if not (wrong := damage(folder)):
            return folder, damaged
        damaged.append(f"{folder.name} {wrong}")
    what = f"no whole checkpoint to go on from: {'; '.join(damaged)}" if damaged else "no checkpoint to go on from"
    raise ValueError(f"{run} holds {what}; start it again with --overwrite")


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, such as `is damaged: FILE is not what was written`; empty where it is whole."""
    try:
        digests = _read_json(folder / "manifest.json")
        odd = [name for name in digests if Path(name).name != name] + [name for name in NEEDED if name not in digests]
        odd += [name for name in (AVERAGE, BEHAVIOUR) if name not in digests and (folder / name).exists()]
        wrong = odd or [name for name, digest in digests.items() if _digest(folder / name) != digest]
        if wrong:
            return f"is damaged: {wrong[0]} is not what was written"
        _refuse_strange_state(folder)
    except FileNotFoundError as error:
        return f"is not complete ({Path(error.filename).name} is missing)"
    except (OSError, ValueError) as error:
        return f"is damaged: {error}"
    return ""


def verify(folder: Path) -> None:
    """Raise ValueError, naming the file and the newest whole checkpoint before, unless it is as it was written."""
    if not (wrong := damage(folder)):
        return
    before = [p for p in checkpoints(folder.parent) if step_of(p) < step_of(folder)]
    whole = next((p for p in reversed(before) if not damage(p)), None)
    raise ValueError(f"checkpoint {folder} {wrong}" + (f"; the one before is {whole}" if whole else ""))


def refuse_others(folder: Path, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError unless a checkpoint holds just these weights, in their shapes, and what belongs to them."""
    try:
        with safe_open(folder / "weights.safetensors", "pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if shapes == {name: list(parameter.shape) for name, parameter in weights.items()}:
            _refuse_strange_tensors(folder, weights)
            return
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from None
    raise ValueError(f"checkpoint {folder} holds other weights than this config trains; resume with the run's own")


def _refuse_strange_state(folder: Path) -> None:
    """Raise ValueError where `state.json`, though it is what the manifest says, is none that a run writes."""
    state = _read_json(folder / "state.json")
    for name in ("step", "forwards", "average_steps"):
        if type(state.get(name)) is not int or state[name] < 0:
            raise ValueError(f"state.json: {name} should be a count, not {state.get(name)!r}")
    if state["step"] != step_of(folder):
        raise ValueError(f"it was written as checkpoint-{state['step']}")
    if type(state.get("seconds")) not in (int, float) or not 0 <= state["seconds"] < math.inf:
        raise ValueError(f"state.json: seconds should be a time, not {state.get('seconds')!r}")
    if not isinstance(state.get("remembers"), str):
        raise ValueError(f"state.json: remembers should be text, not {state.get('remembers')!r}")
    alike = state.get("rewards", {})
    if not isinstance(alike, dict) or not all(isinstance(one, list) and len(one) == 2 for one in alike.values()):
        raise ValueError(f"state.json: rewards should hold a number and a count for each, not {alike!r:.80}")
    if (folder / AVERAGE).exists() != bool(state["average_steps"]):
        raise ValueError(f"state.json and {AVERAGE} do not belong together")


def _refuse_strange_tensors(folder: Path, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError where tensors, though they are what the manifest says, are none that a run of these writes."""
    optional = [name for name in (AVERAGE, BEHAVIOUR) if (folder / name).exists()]
    for name in ("weights.safetensors", *optional):
        tensors = load_file(folder / name)
        if tensors.keys() != weights.keys() or any(not _is_like(t, weights[key]) for key, t in tensors.items()):
            raise ValueError(f"{name} holds other tensors than the weights' own, or such as are not finite")
    kinds: dict[str, set[str]] = {}
    for key, moment in load_file(folder / "optimizer.safetensors").items():
        of, _, kind = key.rpartition("/")
        kinds.setdefault(of, set()).add(kind)
        if of not in weights or (kind in MOMENTS and not _is_like(moment, weights[of])) or moment.isnan().any():
            raise ValueError(f"optimizer.safetensors: {key} is not of these weights, or not finite")
        if kind == "step" and not (moment.numel() == 1 and 0 <= moment.item() < math.inf):
            raise ValueError(f"optimizer.safetensors: {key} is no count of steps")
    for of, found in kinds.items():
        if "step" not in found or found & MOMENTS not in (set(), MOMENTS):
            raise ValueError(f"optimizer.safetensors lacks some of what is kept of {of}")


def _is_like(tensor: Tensor, weight: Tensor) -> bool:
    return tensor.shape == weight.shape and tensor.dtype == weight.dtype and bool(tensor.isfinite().all())


def _read_json(file: Path) -> dict[str, Any]:
    """The object that a file of JSON holds; a ValueError where it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no object")
    return content


def _optimizer_tensors(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in weights.items()}
    return {
        f"{name}/{key}": torch.as_tensor(value).clone()  # bitsandbytes has one table for all weights, a file may not
        for name, state in states.items()
        for key, value in state.items()
    }


@torch.no_grad()
def _fill(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(part_of(value, tensor))


def _restored(key: str, saved: Tensor, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Any:
    """What an optimizer keeps of a parameter: the number of its steps torch has on the host, bitsandbytes as an int."""
    if not key.endswith("/step"):
        return part_of(saved, parameter)
    return saved if isinstance(optimizer, torch.optim.AdamW) else int(saved)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
