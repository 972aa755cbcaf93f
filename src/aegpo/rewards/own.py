"""A user's own reward: a function, plain or `async`, a class, or a `Reward`, named by file or by module."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np

from aegpo.rewards import Metadata, Reward
from aegpo.types import Judgement


def load_own(name: str, settings: Mapping[str, Any]) -> Reward:
    """The reward that stands at `file.py:NAME` or `package.module:NAME`.

    A class is made with the settings, and then called as a function is; a function is called with them as keywords.

    Raises:
        ValueError: there is no such file or name, it cannot be imported, or it does not take these settings.
    """
    found: Any = _import(name)
    if isinstance(found, Reward):
        if settings:
            raise ValueError(f"reward: {name} takes no settings but range, and {next(iter(settings))} was given")
        return found
    try:
        if inspect.isclass(found):
            found = found(**settings)
        elif settings:
            inspect.signature(found).bind_partial(**settings)
            found = partial(found, **settings)
    except TypeError as error:
        raise ValueError(f"reward: {name} does not take its settings: {error}") from None
    except Exception as error:  # of the user's own class
        raise ValueError(f"reward: {name} cannot be made: {type(error).__name__}: {error}") from error
    return from_function(found, name)


def from_function(function: Callable[..., Any], name: str) -> Reward:
    """A function of images, prompts and, if it has a third argument without a default, metadata, as a reward.

    What it answers is checked: n numbers, which need not be finite. One that is `async` is a reward elsewhere: it may
    be called again before it has answered, always in one event loop.
    """
    is_async, takes_metadata = _is_async(function), _takes(function, 3)
    _refuse_others(function, name, 2 + takes_metadata, "images, prompts and maybe metadata")

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        given = (images, prompts, metadata) if takes_metadata else (images, prompts)
        return Judgement(_answer(lambda: _result(function(*given), is_async), name, len(images)))

    return Reward(name, judge, elsewhere=is_async)


def groupwise(function: Callable[..., Any]) -> Reward:
    """A function, as `from_function` takes it, that is to see all images of one prompt in a call, and no others."""
    return replace(from_function(function, function.__name__), groupwise=True)


def pairwise(function: Callable[..., Any]) -> Reward:
    """A function that says which of two images is better, as a reward: how often an image would win in its group.

    Args:
        function: of first and second images, uint8 (m, H, W, 3) each, the m prompts and, if it has a fourth argument
            without a default, metadata -> m probabilities that the first is better. It sees each pair of a group once.

    Returns:
        A groupwise reward in [0, 1]: the mean over the others of its group; 0.5 for an image that is alone.
    """
    is_async, takes_metadata = _is_async(function), _takes(function, 4)
    _refuse_others(
        function, function.__name__, 3 + takes_metadata, "first images, second images, prompts and maybe metadata"
    )

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        count = len(images)
        if count < 2:
            return Judgement(np.full(count, 0.5, np.float32))
        first, second = np.array(list(combinations(range(count), 2))).T
        about = [[kept[i] for i in first] for kept in (prompts, metadata)]
        given = (images[first], images[second], *about[: 1 + takes_metadata])
        wins = np.full((count, count), 0.5)
        wins[first, second] = _answer(
            lambda: _result(function(*given), is_async), function.__name__, len(first), "pairs"
        )
        wins[second, first] = 1 - wins[first, second]
        return Judgement(((wins.sum(1) - 0.5) / (count - 1)).astype(np.float32))

    return Reward(function.__name__, judge, (0.0, 1.0), groupwise=True, elsewhere=is_async)


def _result(answer: Any, is_async: bool) -> Any:
    return asyncio.run_coroutine_threadsafe(_outlived(answer), _loop()).result() if is_async else answer


async def _outlived(answer: Awaitable[Any]) -> Any:
    """The answer; a SystemExit, which would end the loop and leave all others waiting, becomes an error."""
    try:
        return await answer
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}").with_traceback(error.__traceback__) from None


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """That of one thread for all that is `async`, so that what a reward keeps open stays usable from call to call."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _is_async(function: Callable[..., Any]) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def _answer(ask: Callable[[], Any], name: str, count: int, of: str = "images") -> np.ndarray:
    """What the user's code answers, float32 (count,); whatever goes wrong is a ValueError that says where."""
    try:
        answer = ask()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((one for one in reversed(frames) if "site-packages" not in one.filename), frames[-1])
        where = f"{Path(frame.filename).name}, line {frame.lineno}"  # the folders above are nobody's business
        raise ValueError(f"reward {name} failed at {where}: {type(error).__name__}: {error}") from error
    try:
        score = np.asarray(answer, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"reward {name} returned something that is not numbers: {answer!r:.80}") from None
    if score.shape != (count,):
        raise ValueError(f"reward {name} returned shape {score.shape} for {count} {of}; one number each is due")
    return score


def _refuse_others(function: Callable[..., Any], name: str, count: int, due: str) -> None:
    """Raise ValueError for a function that cannot be called with so many arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError as error:
        raise ValueError(f"reward: {name} should take {due}: {error}") from None


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it has that many positional arguments without a default."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in positional]
    return len(parameters) >= count and parameters[count - 1].default is inspect.Parameter.empty


def _import(name: str) -> Any:
    where, _, attribute = name.rpartition(":")
    if not where:
        raise ValueError(f"reward: {name!r} names no file or module before the colon")
    path = Path(where).resolve()
    if where.endswith(".py") and not path.is_file():
        raise ValueError(f"reward: file {where} does not exist")
    try:
        if where.endswith(".py"):
            module = _run(path, path.stat().st_mtime_ns)
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"reward: {where} cannot be imported: {error}") from None
    except SyntaxError as error:
        raise ValueError(f"reward: {where} is not valid Python: line {error.lineno}: {error.msg}") from None
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"reward: {where} has no function or class {attribute!r}")
    return found


@cache
def _run(path: Path, modified: int) -> ModuleType:
    """The module that a file makes, run once for all that is named of it."""
    sys.path.append(str(path.parent))  # last: nothing there takes the place of a module
    spec = importlib.util.spec_from_file_location(f"aegpo_reward_{path.stem}_{modified}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
