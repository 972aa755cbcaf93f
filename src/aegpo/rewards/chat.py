"""A vision language model behind an OpenAI-compatible endpoint: asked about many pictures at once, by one thread."""

import asyncio
import base64
import io
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from email.utils import parsedate_to_datetime
from functools import cache
from threading import Thread
from typing import Any, TypeVar

import httpx
import numpy as np
from PIL import Image

from aegpo.config import did_you_mean

KEY, OPENAI_KEY, OPENAI = "AEGPO_VLM_KEY", "OPENAI_API_KEY", "https://api.openai.com"  # the last goes there alone
MAX_TOKENS = 2048  # of an answer, thoughts included
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds: at most before the first repetition, twice that before the next; of any
LONGEST_WAIT = 300.0  # seconds that a server may ask for
CHECK = 10.0  # seconds for the list of models
OTHERWISE = {"response_format": None, "max_tokens": "max_completion_tokens", "temperature": None}  # names where refused
QUOTED = 200  # characters of what a server says

T = TypeVar("T")
S = TypeVar("S")
jitter = random.SystemRandom()


class Chat:
    """The model; it may be asked from several threads.

    Args:
        url: the endpoint's base, such as http://localhost:8000/v1.
        model: its name there.
        schema: of answers, by JSON Schema; without one they are in the model's own words.
        concurrency: how many answers are awaited at once, by all threads together.
        timeout: seconds for an answer.
        retries: how often what fails in passing is tried again: time-outs, broken connections, 408, 429 and 5xx.

    Raises:
        ValueError: it cannot be used: the url or the key is no such thing, nobody answers, or it has no such model.
    """

    def __init__(
        self, url: str, model: str, schema: dict[str, Any] | None, concurrency: int, timeout: float, retries: int
    ):
        self.url, self.model, self.timeout, self.retries = _base(url), model, timeout, retries
        self.key_name, self.key = _key(self.url)
        self.form: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}
        if schema:
            form = {"name": "answer", "strict": True, "schema": schema}
            self.form["response_format"] = {"type": "json_schema", "json_schema": form}
        self.refused: set[str] = set()
        self.certificates = httpx.create_ssl_context()
        self.places = asyncio.Semaphore(concurrency)
        self.loop = _loop()
        self.each(self._check, ["/models"])

    def each(self, function: Callable[[httpx.AsyncClient, T], Awaitable[S]], items: Iterable[T]) -> list[S]:
        """What an `async` function says of each item, all awaited together; if one fails, the others are called off."""
        work = asyncio.run_coroutine_threadsafe(self._together(function, items), self.loop)
        try:
            return work.result()
        finally:
            work.cancel()  # where the wait was interrupted

    async def say(
        self, client: httpx.AsyncClient, pictures: Sequence[np.ndarray], text: str, temperature: float = 0
    ) -> str | None:
        """The answer to a text about pictures, uint8 (H, W, 3) each; None where there is none, or not all of one.

        Raises:
            ValueError: the server cannot be reached, keeps failing, or refuses.
        """
        async with self.places:
            content = [*await asyncio.to_thread(_shown, pictures), {"type": "text", "text": text}]
            body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.form}
            body["temperature"] = temperature
            refused = set(self.refused)
            while True:
                answer = await self._send(client, "POST", "/chat/completions", self.timeout, _without(body, refused))
                more = self._refusal(answer, refused)
                if not more:
                    break
                refused.add(more)
        if answer.is_success:
            self.refused |= refused
            return _said(answer)
        if _filtered(answer):
            return None
        raise self._error(answer)

    async def _together(self, function: Callable[[httpx.AsyncClient, T], Awaitable[S]], items: Iterable[T]) -> list[S]:
        async def one(item: T) -> S:
            return await function(client, item)

        try:
            async with self._client() as client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(item)) for item in items]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            verify=self.certificates,
            timeout=None,
            limits=httpx.Limits(max_connections=None),
            trust_env=self.url.startswith("https:"),  # proxies through a tunnel only: without, they would read the key
        )

    async def _send(
        self, client: httpx.AsyncClient, method: str, path: str, timeout: float, body: Any = None
    ) -> httpx.Response:
        """The answer that is not one of failure in passing, after as many tries as it takes."""
        problem = ""
        for attempt in range(self.retries + 1):
            wait = 0.0
            try:
                async with asyncio.timeout(timeout):
                    answer = await client.request(method, self.url + path, json=body)
            except TimeoutError:
                problem = f"gives no answer within {timeout:g} s"
            except httpx.ConnectError as error:
                raise ValueError(
                    f"reward: vlm: {self.url} cannot be reached: {self._quote(str(error))}; url should be the base of "
                    "a running server, such as http://localhost:8000/v1"
                ) from None
            except httpx.HTTPError as error:
                problem = f"breaks off: {self._quote(str(error))}"
            else:
                if not _in_passing(answer):
                    return answer
                problem, wait = f"answers {self._status(answer)}", _retry_after(answer)
                if wait > LONGEST_WAIT:
                    raise ValueError(f"reward: vlm: {self.url} {problem}, and asks to wait {wait:.0f} s")
            if attempt < self.retries:
                await asyncio.sleep(wait + jitter.uniform(0, min(PAUSE * 2**attempt, LONGEST_PAUSE)))
        raise ValueError(f"reward: vlm: {self.url} {problem} (tries: {self.retries + 1})")

    async def _check(self, client: httpx.AsyncClient, path: str) -> None:
        """Raises ValueError where nobody is there, or it lists its models and this one is not among them."""
        answer = await self._send(client, "GET", path, min(self.timeout, CHECK))
        if answer.status_code in (401, 403):
            raise self._error(answer)
        try:
            known = [str(model["id"]) for model in answer.json()["data"]] if answer.is_success else []
        except (LookupError, TypeError, ValueError):
            return
        if known and self.model not in known and f"{self.model}:latest" not in known:  # Ollama adds the tag itself
            listed = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
            raise ValueError(
                f"reward: vlm: {self.url} has no model {self.model!r}; it has {listed}{did_you_mean(self.model, known)}"
            )

    def _refusal(self, answer: httpx.Response, refused: set[str]) -> str | None:
        """The part of the form that the server will not have, if that is why it says no."""
        if _filtered(answer):
            return None
        open_to = [name for name in OTHERWISE if name in self.form and name not in refused]
        named = [name for name in open_to if name in answer.text]
        if answer.status_code in (400, 422):
            return next(iter([*named, *open_to[: "response_format" in open_to]]), None)
        return "response_format" if answer.status_code >= 500 and "response_format" in named else None

    def _error(self, answer: httpx.Response) -> ValueError:
        if answer.status_code in (401, 403):
            said = f"refuses the key in {self.key_name}" if self.key else f"wants a key, in {KEY}"
            return ValueError(f"reward: vlm: {self.url} {said} ({answer.status_code})")
        if answer.is_redirect:
            return ValueError(f"reward: vlm: {self.url} points elsewhere ({answer.status_code}), where nobody is asked")
        said = f"reward: vlm: {self.url} answers {self._status(answer)}"
        if answer.status_code == 404:
            said += "; url should be the base, such as http://localhost:8000/v1, and model one that is there"
        return ValueError(said)

    def _status(self, answer: httpx.Response) -> str:
        """Its number and the server's words for it."""
        try:
            told = answer.json()
            told = told.get("error", told)
            words = told if isinstance(told, str) else str(told.get("message") or told.get("detail") or told)
        except (AttributeError, ValueError):
            words = answer.text
        return f"{answer.status_code}: {self._quote(words)}" if words.strip() else f"{answer.status_code}"

    def _quote(self, words: str) -> str:
        words = " ".join((words.replace(self.key, "KEY") if self.key else words).split())
        return words if len(words) <= QUOTED else f"{words[:QUOTED]}..."


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """That of the thread that asks, so that it makes no odds in which thread the question comes up."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="vlm", daemon=True).start()
    return loop


def _base(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError(f"reward: vlm: url: should be no more than the base, without ?, # and @; a key is in {KEY}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"reward: vlm: url: should be as http://localhost:8000/v1, got {url!r}")
    return url.rstrip("/")


def _key(url: str) -> tuple[str, str]:
    """The name and the value of the key, both empty where there is none; OpenAI's own is for nobody else."""
    for name in (KEY, OPENAI_KEY) if url.startswith(f"{OPENAI}/") else (KEY,):
        if key := os.environ.get(name, "").strip():
            if not re.fullmatch("[!-~]+", key):
                raise ValueError(
                    f"reward: vlm: what {name} has in the environment is no key: it has a space or the like"
                )
            return name, key
    return "", ""


def _shown(pictures: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    parts = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG", compress_level=1)
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return parts


def _without(body: dict[str, Any], refused: set[str]) -> dict[str, Any]:
    """The body with what is refused left out, or under its other name."""
    kept = {OTHERWISE[name] if name in refused else name: value for name, value in body.items()}
    return {name: value for name, value in kept.items() if name}


def _said(answer: httpx.Response) -> str | None:
    try:
        choice = answer.json()["choices"][0]
        text = choice["message"]["content"]
        whole = choice.get("finish_reason") != "length"
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    return text if isinstance(text, str) and whole else None


def _filtered(answer: httpx.Response) -> bool:
    """Whether it is this picture or prompt that the server will not speak of, as OpenAI and Azure put it."""
    return answer.status_code == 400 and bool(re.search("content_(filter|policy)", answer.text))


def _in_passing(answer: httpx.Response) -> bool:
    """Whether it may be otherwise in a while."""
    status = answer.status_code
    return status in (408, 429) or (status >= 500 and status != 501 and "response_format" not in answer.text)


def _retry_after(answer: httpx.Response) -> float:
    """The seconds that the server asks to wait, 0 if it does not."""
    value = answer.headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
