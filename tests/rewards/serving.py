"""Reward servers on the loopback, in a thread or as a process, and requests to them by the standard library alone."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import uvicorn

from aegpo.rewards import Reward, on_frames
from aegpo.rewards.server import Service, _bound
from aegpo.rewards.wire import SAFETENSORS, packed
from aegpo.types import Judgement

JSON = "application/json"


def numbered(*numbers, size=(2, 2)):
    """Pictures that each hold a number below 2**24, which a float32 holds too."""
    images = np.zeros((len(numbers), *size, 3), np.uint8)
    images[:, 0, 0] = [[n >> 16, n >> 8 & 255, n & 255] for n in numbers]
    return images


def read(images):
    """The numbers that they hold, float32 (n,)."""
    return images[:, 0, 0].astype(np.float32) @ np.array([65536, 256, 1], np.float32)


def reward(score=read, calls=None, **settings):
    """A reward of images alone, which keeps what it was called with."""

    def judge(images, prompts, metadata):
        if calls is not None:
            calls.append((images, list(prompts), list(metadata)))
        return Judgement(np.asarray(score(images), np.float32))

    return Reward("numbers", on_frames(judge), **settings)


@contextmanager
def serving(served, token=None, batch=64, wait=0.005, limit=2**20, timeout=30.0):
    """The URL of a server in a thread."""
    service = Service(served, token, batch, wait, limit, timeout)
    with _bound("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(service.app(), lifespan="off", log_level="critical"))
        thread = threading.Thread(target=server.run, args=([bound],))
        bound.listen()
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


class Process:
    """`aegpo reward-server` as a process of its own."""

    def __init__(self, *words, port=0, **environment):
        self.words, self.environment = words, environment
        self.start(port)

    def start(self, port):
        words = [sys.executable, "-m", "aegpo.cli", "reward-server", *map(str, self.words), "--port", str(port)]
        about = os.environ | self.environment
        self.popen = subprocess.Popen(words, env=about, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.line = self.popen.stdout.readline()
        assert self.line.startswith("serving "), self.popen.stderr.read()
        self.url = self.line.split()[-1]
        self.port = urlsplit(self.url).port

    def stop(self, how=signal.SIGTERM):
        """Its exit code, and what it wrote after its first line."""
        self.popen.send_signal(how)
        said = self.popen.communicate(timeout=20)
        return self.popen.returncode, *said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.popen.kill()
        self.popen.communicate()


class Client:
    """One connection, which is kept."""

    def __init__(self, url, token=None):
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def ask(self, body, kind=SAFETENSORS, method="POST", path="/score", **headers):
        """The status, and the answer, JSON or text."""
        self.connection.request(method, path, body, {"Content-Type": kind} | self.headers | headers)
        self.reply = self.connection.getresponse()
        text = self.reply.read()
        return self.reply.status, json.loads(text) if self.reply.headers["Content-Type"] == JSON else text.decode()

    def get(self, path):
        return self.ask(None, method="GET", path=path)

    def score(self, images, id="", prompts=None, metadata=None):
        count = len(images)
        body = packed(images, prompts or ["a"] * count, metadata or [{}] * count, id or os.urandom(8).hex())
        status, said = self.ask(body)
        assert status == 200, said
        return said["scores"]

    def metrics(self):
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name.removeprefix("aegpo_reward_"): float(value) for name, value in lines}

    def close(self):
        self.connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def wait_until(holds, seconds=20.0):
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def in_threads(work, *arguments):
    """What `work` gives for each argument, all at once."""
    results = [None] * len(arguments)

    def run(place, argument):
        results[place] = work(argument)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(arguments)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def own(folder, body):
    """A reward in a file, for a process."""
    path = Path(folder) / "own_reward.py"
    path.write_text(body)
    return f"{path}:score"
