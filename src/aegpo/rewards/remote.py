"""A reward that `aegpo reward-server` serves, on this machine or another, or that several serve between them."""

import asyncio
import math
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import SystemRandom

import httpx
import numpy as np
from pydantic import BaseModel, ValidationError

from aegpo.rewards import Metadata, Reward
from aegpo.rewards.wire import SAFETENSORS, packed, read_token
from aegpo.types import Judgement

PART_IMAGES, PART_BYTES = 64, 16 * 2**20  # of one request, at most, unless one image has more
PARTS = 4  # that a server is asked at once
CONNECT = 10.0  # seconds in which a server that is there lets others connect
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds before a server is asked again, at most
QUIET = 5.0  # seconds that are waited without a word
BUSY = (502, 503, 504)

jitter = SystemRandom()  # a run's generators are seeded alike at each step, and are for rewards that draw from them


class Health(BaseModel):
    """What a server says of itself."""

    reward: str
    range: tuple[float | None, float | None]
    groupwise: bool


class Answer(BaseModel):
    """What a server says of images; pydantic reads "nan", "inf" and "-inf" as the numbers that they are."""

    reward: str
    scores: list[float]
    passed: list[bool] | None


@dataclass(eq=False)
class Server:
    """One of those that serve the reward.

    Attributes:
        url: without a slash at its end.
        asked: parts that it is being asked.
        failed: how often in a row it could not be asked, and `failed_at` when that was last.
        rests: until when, by the monotonic clock, it is better not asked.
    """

    url: str
    asked: int = 0
    failed: int = 0
    failed_at: float = -math.inf
    rests: float = 0.0


class Trouble(Exception):
    """A server that could not be asked, in a request that began then; `after` so many seconds it may be."""

    def __init__(self, what: str, began: float, after: float = 0.0):
        super().__init__(what)
        self.began, self.after = began, after


def load(url: str, token_file: str | None = None, timeout: float = 60, patience: float = 300) -> Reward:
    """The reward that is served there; its range, and whether it compares, are what the servers say.

    The images of a call are dealt to the servers. One that is away or busy is asked again, or another is.

    Args:
        url: such as `http://10.0.0.2:8123`; several with commas between them, which serve the same reward.
        token_file: that holds the token the servers want; by default the environment's AEGPO_REWARD_TOKEN.
        timeout: seconds in which a request is answered.
        patience: seconds after which images that no server could be asked about end the run.

    Raises:
        ValueError: a server cannot be reached, or they serve different rewards.
    """
    if not (timeout > 0 and patience >= 0):
        raise ValueError(f"reward: remote: timeout and patience are seconds, got {timeout:g} and {patience:g}")
    try:
        token = read_token(token_file)
    except ValueError as error:
        raise ValueError(f"reward: remote: {error}") from None
    urls = [_checked(part.strip()) for part in url.split(",")]
    health = [_health(part, timeout) for part in urls]
    for part, said in zip(urls, health, strict=True):
        if said != health[0]:
            raise ValueError(
                f"reward: remote: {urls[0]} serves {_described(health[0])}, and {part} serves {_described(said)}; "
                "they should serve the same"
            )
    low, high = health[0].range
    limits = -math.inf if low is None else low, math.inf if high is None else high
    remote = Remote(urls, health[0], token, timeout, patience)
    return Reward("remote", remote.judge, limits, health[0].groupwise, elsewhere=True)


class Remote:
    """Asks servers, from any number of threads; all requests are made in a thread of its own, on connections it keeps.

    Args:
        urls: of the servers.
        health: what each of them said of itself.
        token: that they want, if any.
        timeout: seconds for one request.
        patience: seconds that a part of the images may fail.
    """

    def __init__(self, urls: Sequence[str], health: Health, token: str | None, timeout: float, patience: float):
        self.servers = [Server(url) for url in urls]
        self.name, self.groupwise, self.patience = health.reward, health.groupwise, patience
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT), pool=None),
            limits=httpx.Limits(keepalive_expiry=30),
            trust_env=all(url.startswith("https:") for url in urls),  # or a proxy would read the token
        )
        self.waits = False  # for so long that it was said
        self.free = asyncio.Semaphore(PARTS * len(urls))
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self.loop,), name="remote reward", daemon=True).start()
        weakref.finalize(self, _end, self.loop, self.client)

    def judge(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        """What the servers say of the images; raises ValueError once one says no, or all have been away too long."""
        if not len(images):
            return Judgement(np.zeros(0, np.float32))
        asked = asyncio.run_coroutine_threadsafe(self._all(images, prompts, metadata), self.loop)
        try:
            return asked.result()
        finally:
            asked.cancel()  # what is still under way when somebody pressed Ctrl-C

    async def _all(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        parts = 1 if self.groupwise else number_of_parts(images, len(self.servers))
        edges = np.linspace(0, len(images), parts + 1).astype(int)
        asked = [
            asyncio.create_task(self._part(images[start:end], prompts[start:end], metadata[start:end]))
            for start, end in pairwise(edges)
        ]
        try:
            said = await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()
        score = np.array([score for part in said for score in part.scores], np.float32)
        verdicts = [part.passed for part in said if part.passed is not None]
        return Judgement(score, np.concatenate(verdicts) if len(verdicts) == len(said) else None)

    async def _part(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Answer:
        async with self.free:
            try:
                body = packed(images, prompts, metadata, uuid.uuid4().hex)
            except TypeError as error:
                raise ValueError(f"reward: remote: the prompts' metadata cannot be sent: {error}") from None
            ends = None
            while True:
                server = min(self.servers, key=lambda server: (max(0.0, server.rests - time.monotonic()), server.asked))
                server.asked += 1
                try:
                    await asyncio.sleep(server.rests - time.monotonic())
                    return await self._ask(server, body, len(images))
                except Trouble as trouble:
                    self._note(server, trouble)
                    now = time.monotonic()
                    ends = ends or now + self.patience
                    if now > ends - self.patience + QUIET and not self.waits:
                        self.waits = True
                        _say(f"waiting for {server.url}, up to {self.patience:g} s: it {trouble}")
                    if max(now, min(server.rests for server in self.servers)) > ends:
                        raise ValueError(
                            f"reward: remote: no server could be asked for {self.patience:g} s; "
                            f"the last, {server.url}, {trouble}"
                        ) from None
                finally:
                    server.asked -= 1

    def _note(self, server: Server, trouble: Trouble) -> None:
        """Let a server rest that could not be asked, the longer the more often; what fails at once counts once."""
        if trouble.began >= server.failed_at:
            server.failed += 1
        server.failed_at = time.monotonic()
        most = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(server.failed - 1, 16))
        server.rests = server.failed_at + max(trouble.after, jitter.uniform(0, most))

    async def _ask(self, server: Server, body: bytes, count: int) -> Answer:
        began = time.monotonic()
        try:
            reply = await self.client.post(f"{server.url}/score", content=body, headers={"Content-Type": SAFETENSORS})
        except httpx.TransportError as error:
            raise Trouble(_how(error), began) from None
        what = f"answered {reply.status_code}: {_line(reply)}"
        if reply.status_code in BUSY:
            after = reply.headers.get("retry-after", "")
            raise Trouble(what, began, float(after) if after.isdecimal() else 0.0)
        server.failed, server.rests = 0, 0.0
        if self.waits:
            self.waits = False
            _say(f"{server.url} answers again")
        if reply.status_code != 200:
            raise ValueError(f"reward: remote: {server.url} {what}")
        try:
            answer = Answer.model_validate_json(reply.content)
        except ValidationError:
            raise ValueError(f"reward: remote: {server.url} answered, but not as aegpo reward-server does") from None
        if answer.reward != self.name:
            raise ValueError(f"reward: remote: {server.url} served {self.name} and now serves {answer.reward}")
        if any(len(part) != count for part in (answer.scores, answer.passed) if part is not None):
            raise ValueError(f"reward: remote: {server.url} gave {len(answer.scores)} scores for {count} images")
        return answer


def _say(line: str) -> None:
    print(f"reward: remote: {line}", file=sys.stderr, flush=True)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    """Close the connections, and let the thread end."""
    closed = asyncio.run_coroutine_threadsafe(client.aclose(), loop)
    closed.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))


def number_of_parts(images: np.ndarray, servers: int) -> int:
    """In how many requests images are sent: at least one a server, none too large, none empty."""
    least = max(servers, math.ceil(len(images) / PART_IMAGES), math.ceil(images.nbytes / PART_BYTES))
    return min(least, len(images))


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"reward: remote: {url!r} is not a URL: {error}") from None
    if parsed.userinfo:
        raise ValueError("reward: remote: a URL must not hold a password; a token goes into AEGPO_REWARD_TOKEN")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ValueError(f"reward: remote: {url!r} should be a URL such as http://127.0.0.1:8123")
    return url.rstrip("/")


def _health(url: str, timeout: float) -> Health:
    hint = "is `aegpo reward-server` running there?"
    try:
        reply = httpx.get(f"{url}/healthz", timeout=timeout, trust_env=url.startswith("https:"))
    except httpx.TransportError as error:
        raise ValueError(f"reward: remote: {url} {_how(error)}; {hint}") from None
    if reply.status_code != 200:
        raise ValueError(f"reward: remote: {url} answered {reply.status_code}: {_line(reply)}; {hint}")
    try:
        return Health.model_validate_json(reply.content)
    except ValidationError:
        raise ValueError(f"reward: remote: {url} answers, but not as a reward server does; {hint}") from None


def _described(health: Health) -> str:
    low, high = health.range
    kind = ", which compares" if health.groupwise else ""
    return f"{health.reward} [{'-inf' if low is None else low}, {'inf' if high is None else high}]{kind}"


def _how(error: httpx.TransportError) -> str:
    return f"could not be reached: {str(error) or type(error).__name__}"


def _line(reply: httpx.Response) -> str:
    """The server's own line, or what else it, or whoever stands before it, sent."""
    try:
        return str(reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(reply.text.split())[:200] or reply.reason_phrase
