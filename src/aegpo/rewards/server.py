"""`aegpo reward-server`: any reward over HTTP. What several clients ask for at the same time is judged together."""

import asyncio
import base64
import hashlib
import hmac
import io
import ipaddress
import json
import signal
import socket
import struct
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field, Json, ValidationError
from safetensors.numpy import load as load_tensors
from starlette.exceptions import HTTPException as NoSuchRoute
from starlette.requests import ClientDisconnect

from aegpo import rewards
from aegpo.rewards import Reward
from aegpo.rewards.wire import SAFETENSORS, TOKEN, public, read_token, spelled

IMAGES = 4096  # of one request, at most
WAITING = 16  # so many times the largest body may wait for the reward, in bytes
KEPT = 1024  # answers that are remembered, for a request that comes again
KEEP_ALIVE = 75  # seconds; longer than clients do, so that it is they who close
LONGEST_LINE = 500
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}

Reply = tuple[int, bytes]  # a status, and JSON


def serve(
    reward: str | dict[str, Any],
    host: str,
    port: int,
    batch: int,
    wait_ms: int,
    limit_mb: int,
    timeout: float,
    token_file: str | None,
) -> None:
    """Serve a reward until SIGTERM, or Ctrl-C; what is in flight then is still answered.

    Args:
        reward: its name, or that with its settings, as `rewards.load_one` has it.
        host: to listen at; other than loopback only with a token.
        port: to listen at; 0 is a free one.
        batch: images that go to the reward in one call, unless a single request has more.
        wait_ms: milliseconds that a request waits for others to go with.
        limit_mb: MB that a request may have, as it is sent and once its pictures are decoded.
        timeout: seconds after which a request is answered that it was not done in time.
        token_file: that holds the token clients must know; else the environment's AEGPO_REWARD_TOKEN.

    Raises:
        ValueError: the port is taken, or the reward or the token cannot be had.
    """
    token = read_token(token_file)
    if token is None and not _is_loopback(host):
        raise ValueError(
            f"reward-server: --host {host} lets others in, so clients must know a token: set {TOKEN}, or --token-file"
        )
    with _bound(host, port) as bound:
        served = rewards.load_one(reward)
        service = Service(served, token, batch, wait_ms / 1000, limit_mb * 2**20, timeout)
        settings = uvicorn.Config(
            service.app(), lifespan="off", log_level="error", access_log=False, timeout_keep_alive=KEEP_ALIVE
        )
        bound.listen(settings.backlog)
        at = f"[{host}]" if ":" in host else host
        print(f"serving {served.name} at http://{at}:{bound.getsockname()[1]}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once it has finished
        uvicorn.Server(settings).run(sockets=[bound])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the port, so that whoever else has it is known of before the reward is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # told so, asyncio lets no answer wait
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        why = error.strerror if isinstance(error, OSError) else "ports end at 65535"
        raise ValueError(f"reward-server: cannot listen at port {port} of {host}: {why}") from None
    return bound


# ---------------------------------------------------------------- what is asked


class Refused(Exception):
    """A request that is not answered by scores: its status, and the line that says why."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


class InJson(BaseModel, extra="forbid", strict=True):
    """The body of a request in JSON; `images` are PNGs, 8-bit RGB, in base64."""

    images: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]] | None = None
    id: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class InHeader(BaseModel, extra="forbid", strict=True):
    """What stands beside the tensor `images` in a body of safetensors, as the metadata of its header."""

    prompts: Json[list[str]]
    metadata: Json[list[dict[str, Any]]] | None = None
    id: Annotated[str, Field(min_length=1, max_length=200)] | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """A request that waits for the reward.

    Attributes:
        images: uint8 (n, H, W, 3), or (n, frames, H, W, 3).
        prompts, metadata: n each.
        since: when it came, by the monotonic clock.
        reply: to come.
    """

    images: np.ndarray
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    since: float = field(default_factory=time.monotonic)
    reply: Future[Reply] = field(default_factory=Future)


def read_json(body: bytes, limit: int) -> tuple[Job, str | None]:
    """The request that a body of JSON makes, and its id."""
    try:
        asked = InJson.model_validate_json(body)
    except ValidationError as error:
        raise Refused(400, _first(error)) from None
    if len(asked.images) > IMAGES:
        raise Refused(413, f"images: {len(asked.images):,} are too many; a request may have {IMAGES:,}")
    pictures: list[np.ndarray] = []
    for number, text in enumerate(asked.images):
        pictures.append(_picture(text, f"images.{number}", limit - sum(picture.nbytes for picture in pictures)))
        if pictures[number].shape != pictures[0].shape:
            raise Refused(400, f"images.{number}: should be as large as images.0; all of a request are of one size")
    return _job(np.array(pictures), asked), asked.id


def read_safetensors(body: bytes, limit: int) -> tuple[Job, str | None]:
    """The request that a body of safetensors makes, and its id; it is no larger in memory than it is."""
    try:
        tensors = load_tensors(body)
    except Exception as error:  # of the library's own, and KeyError for dtypes that numpy lacks
        raise Refused(400, f"the body is not safetensors: {error}") from None
    if list(tensors) != ["images"]:
        raise Refused(400, f"the body should hold one tensor, images, and holds {', '.join(tensors) or 'none'}")
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    try:
        asked = InHeader.model_validate(header.get("__metadata__", {}))
    except ValidationError as error:
        raise Refused(400, f"header: {_first(error)}") from None
    return _job(tensors["images"], asked), asked.id


READERS = {"application/json": read_json, SAFETENSORS: read_safetensors}


def _picture(text: str, where: str, room: int) -> np.ndarray:
    """The picture, uint8 (H, W, 3), of a PNG in base64, which is decoded only where it finds that much room."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise Refused(400, f"{where}: is not base64") from None
    if len(data) < 24 or not data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        raise Refused(400, f"{where}: is not a PNG")
    width, height = struct.unpack(">II", data[16:24])
    if 3 * width * height > room:
        raise Refused(413, f"{where}: {width} x {height} pixels are too many for one request")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != (width, height):
                wrong = "is a PNG of two sizes"
            elif picture.mode != "RGB":
                wrong = f"should be RGB, 8 bits each, not {picture.mode}"
            else:
                return np.asarray(picture)
    except Exception as error:  # Pillow's own, OSError, SyntaxError, struct's and zlib's
        wrong = f"is a PNG that cannot be read: {error}"
    raise Refused(400, f"{where}: {wrong}")


def _job(images: np.ndarray, asked: InJson | InHeader) -> Job:
    count, metadata = len(images) if images.ndim else 0, asked.metadata
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3 or not images.size:
        raise Refused(
            400,
            f"images: should be uint8 (n, height, width, 3) or (n, frames, height, width, 3), and one at least; "
            f"got {images.dtype} {images.shape}",
        )
    if count > IMAGES:
        raise Refused(413, f"images: {count:,} are too many; a request may have {IMAGES:,}")
    metadata = [{}] * count if metadata is None else metadata
    for what, given in (("prompts", asked.prompts), ("metadata", metadata)):
        if len(given) != count:
            raise Refused(400, f"{what}: {len(given)} for {count} images; one each is due")
    return Job(images, asked.prompts, metadata)


def _digest(job: Job) -> bytes:
    about = json.dumps([job.images.shape, job.prompts, job.metadata])
    return hashlib.blake2b(about.encode() + job.images.tobytes()).digest()


def _first(error: ValidationError) -> str:
    wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, wrong["loc"]))
    return (f"{where}: " if where else "") + wrong["msg"][0].lower() + wrong["msg"][1:]


# ---------------------------------------------------------------- what is answered


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known = {"namespace": "aegpo_reward", "registry": self.registry}
        self.requests = Counter("requests", "Requests to score, by the status of the answer.", ["status"], **known)
        self.images = Counter("images", "Images, or videos, that the reward has scored.", **known)
        sizes = [2**power for power in range(13)]
        self.batch = Histogram("batch_images", "Images that went to the reward in one call.", buckets=sizes, **known)
        self.queue = Histogram("queue_seconds", "Seconds that a request waited for the reward.", **known)
        self.judging = Histogram("judge_seconds", "Seconds that a call of the reward took.", **known)
        self.waiting = Gauge("queue_requests", "Requests that wait for the reward.", **known)


class Worker:
    """Asks the reward, one call at a time, in a thread of its own, which ends with the process."""

    def __init__(self, reward: Reward, most: int, wait: float, metrics: Metrics):
        self.reward, self.most, self.wait, self.metrics = reward, most, wait, metrics
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.held = 0  # bytes of images that wait or are judged
        metrics.waiting.set_function(lambda: len(self.waiting))
        threading.Thread(target=self._work, name="reward", daemon=True).start()

    def put(self, job: Job) -> None:
        """Let it be judged in its turn."""
        with self.changed:
            self.waiting.append(job)
            self.held += job.images.nbytes
            self.changed.notify()

    def _work(self) -> None:
        while True:
            taken = self._take()
            jobs = [job for job in taken if job.reply.set_running_or_notify_cancel()]
            for job in jobs:
                self.metrics.queue.observe(time.monotonic() - job.since)
            replies = self._replies(jobs) if jobs else []
            with self.changed:
                self.held -= sum(job.images.nbytes for job in taken)
            for job, reply in zip(jobs, replies, strict=True):
                job.reply.set_result(reply)

    def _take(self) -> list[Job]:
        """The request that came first, and those that can go with it once they are enough or it has waited."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            first = self.waiting[0]
            ends = first.since + self.wait
            self.changed.wait_for(lambda: self._together(first)[1], max(0.0, ends - time.monotonic()))
            together, _ = self._together(first)
            self.waiting = deque(job for job in self.waiting if job not in together)
            return together

    def _together(self, first: Job) -> tuple[list[Job], bool]:
        """What would be judged in one call now, and whether no more could be."""
        if self.reward.groupwise:
            return [first], True
        together: list[Job] = []
        count = 0
        for job in self.waiting:
            if job.images.shape[1:] == first.images.shape[1:]:
                if together and count + len(job.images) > self.most:
                    return together, True
                together.append(job)
                count += len(job.images)
        return together, count >= self.most

    def _replies(self, jobs: Sequence[Job]) -> list[Reply]:
        """What is answered to each; where a call of several fails each is tried alone, since one may be to blame."""
        try:
            return self._judged(jobs)
        except Exception as error:  # of the reward, which may be anybody's
            if len(jobs) > 1:
                return [reply for job in jobs for reply in self._replies([job])]
            line = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return [(500, _error(line))]

    def _judged(self, jobs: Sequence[Job]) -> list[Reply]:
        images = np.concatenate([job.images for job in jobs])
        prompts = [prompt for job in jobs for prompt in job.prompts]
        metadata = [about for job in jobs for about in job.metadata]
        self.metrics.batch.observe(len(images))
        with self.metrics.judging.time():
            said = self.reward.judge(images, prompts, metadata)
        for part in (said.score, said.passed):
            if part is not None and part.shape != (len(images),):
                raise ValueError(f"reward {self.reward.name} answered shape {part.shape} for {len(images)} images")
        self.metrics.images.inc(len(images))
        replies, end = [], 0
        for job in jobs:
            start, end = end, end + len(job.images)
            passed = None if said.passed is None else said.passed[start:end].tolist()
            about = {"reward": public(self.reward.name), "scores": spelled(said.score[start:end]), "passed": passed}
            replies.append((200, json.dumps(about).encode()))
        return replies


@dataclass(frozen=True)
class Kept:
    """A request that has an id: what it asked, as a digest, and its reply, which may be yet to come."""

    asked: bytes
    reply: Future[Reply]


class Service:
    """Answers requests.

    Args:
        reward: what is served.
        token: that requests must know, but for /healthz.
        batch: images that go to the reward in one call, unless a single request has more.
        wait: seconds that a request waits for others to go with.
        limit: bytes of a body, and of its pictures once decoded.
        timeout: seconds that a request may take.
    """

    def __init__(self, reward: Reward, token: str | None, batch: int, wait: float, limit: int, timeout: float):
        self.reward, self.token, self.limit, self.timeout = reward, token, limit, timeout
        self.metrics = Metrics()
        self.worker = Worker(reward, batch, wait, self.metrics)
        self.reading = 0  # bytes of bodies that are being read
        self.kept: OrderedDict[str, Kept] = OrderedDict()

    def app(self) -> FastAPI:
        """The routes, to be run in one event loop."""
        app = FastAPI(openapi_url=None)
        app.add_api_route("/score", self.score, methods=["POST"])
        app.add_api_route("/healthz", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.numbers, methods=["GET"])

        async def elsewhere(request: Request, error: Exception) -> Response:
            assert isinstance(error, NoSuchRoute)
            return _response((error.status_code, _error("there are POST /score, GET /healthz and GET /metrics")))

        app.add_exception_handler(NoSuchRoute, elsewhere)
        return app

    async def health(self) -> Response:
        """`GET /healthz`."""
        limits = [limit if np.isfinite(limit) else None for limit in self.reward.range]
        about = {
            "status": "ok",
            "reward": public(self.reward.name),
            "range": limits,
            "groupwise": self.reward.groupwise,
        }
        return _response((200, json.dumps(about | {"version": version("aegpo")}).encode()))

    async def numbers(self, request: Request) -> Response:
        """`GET /metrics`."""
        try:
            self._admit(request)
        except Refused as refusal:
            return _response((refusal.status, _error(str(refusal))))
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def score(self, request: Request) -> Response:
        """`POST /score`."""
        try:
            self._admit(request)
            async with asyncio.timeout(self.timeout):
                reply = await self._reply(request)
        except Refused as refusal:
            reply = refusal.status, _error(str(refusal))
        except TimeoutError:
            reply = 503, _error(f"not done within {self.timeout:g} s")
        except ClientDisconnect:
            reply = 400, _error("the body ends before it should")
        self.metrics.requests.labels(reply[0]).inc()
        return _response(reply)

    def _admit(self, request: Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise Refused(401, f"a token is needed, as 'Authorization: Bearer TOKEN'; {TOKEN} should hold it")

    async def _reply(self, request: Request) -> Reply:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in READERS:
            raise Refused(415, f"Content-Type: should be {' or '.join(READERS)}")
        body = bytearray()
        try:
            await self._read(request, body)
            reply, has_id = await self._asked(READERS[kind], bytes(body))
        finally:
            self.reading -= len(body)
        try:
            await asyncio.wait([asyncio.wrap_future(reply)])
        finally:
            if not has_id:
                reply.cancel()  # nobody can ask for it again
        return reply.result()

    async def _read(self, request: Request, body: bytearray) -> None:
        """Fill `body`, while there is room for it; of what is sent in vain uvicorn disposes."""
        async for chunk in request.stream():
            body += chunk
            self.reading += len(chunk)
            if len(body) > self.limit:
                raise Refused(413, f"the body is larger than the {self.limit / 2**20:g} MB that it may have")
            if self.reading + self.worker.held > WAITING * self.limit:
                raise Refused(503, "too many wait already")

    async def _asked(
        self, read: Callable[[bytes, int], tuple[Job, str | None]], body: bytes
    ) -> tuple[Future[Reply], bool]:
        """The reply to come, and whether the request has an id, by which it may be known already."""
        job, id = await asyncio.to_thread(read, body, self.limit)
        if id is None:
            self.worker.put(job)
            return job.reply, False
        digest = await asyncio.to_thread(_digest, job)
        kept = self.kept.get(id)
        if kept and kept.asked != digest:
            raise Refused(409, f"id: {id!r} is that of another request")
        if kept and not (kept.reply.done() and kept.reply.result()[0] != 200):
            return kept.reply, True
        self.kept[id] = Kept(digest, job.reply)
        while len(self.kept) > KEPT and next(iter(self.kept.values())).reply.done():
            self.kept.popitem(last=False)
        self.worker.put(job)
        return job.reply, True


def _error(line: str) -> bytes:
    return json.dumps({"error": " ".join(line.split())[:LONGEST_LINE]}).encode()


def _response(reply: Reply) -> Response:
    status, content = reply
    return Response(content, status, HEADERS.get(status), "application/json")
