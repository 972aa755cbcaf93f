"""What `aegpo reward-server` carries: 64 clients at once beside one client that asks one thing after another.

python benchmarks/reward_server.py [--json FILE]

The same 2,000 requests of one picture, 64 x 64, as safetensors over connections that are kept, come from 64 threads of
this process, or from one; the server is a process of its own. There are two rewards: one that takes no time, so that
what is measured is the server, and one that takes 4 ms a call and 0.1 ms a picture, as a small network does, so that it
pays to judge together. One client alone waits for nobody: its server has --wait-ms 0, and is measured with the default
of 5 ms too. Latencies are in milliseconds, from a request's first byte to its answer's last.
"""

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from demo import git
from rich.console import Console
from rich.table import Table

from aegpo.rewards.wire import SAFETENSORS, packed

REQUESTS, CLIENTS, SIDE = 2000, 64, 64
REWARDS = {
    "takes no time": "def score(images, prompts):\n    return images[:, 0, 0, 0]\n",
    "4 ms a call, 0.1 ms a picture": (
        "import time\n\n\ndef score(images, prompts):\n    time.sleep(0.004 + 0.0001 * len(images))\n"
        "    return images[:, 0, 0, 0]\n"
    ),
}


def asked(url: str, clients: int) -> dict[str, float]:
    """Requests a second, the latencies' median and 99th percentile, and how many were judged together."""
    image = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    milliseconds: list[float] = []
    together = threading.Barrier(clients + 1)

    def client(count: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.connect()
        bodies = [packed(image, ["a red ring"], [{}], f"{random.getrandbits(128):032x}") for _ in range(count)]
        together.wait()
        for body in bodies:
            began = time.perf_counter()
            connection.request("POST", "/score", body, {"Content-Type": SAFETENSORS})
            said = json.loads(connection.getresponse().read())
            milliseconds.append(1000 * (time.perf_counter() - began))
            assert said["scores"] == [image[0, 0, 0, 0]]
        connection.close()

    shares = [REQUESTS // clients + (i < REQUESTS % clients) for i in range(clients)]
    threads = [threading.Thread(target=client, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    together.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    assert len(milliseconds) == REQUESTS
    middle, late = np.percentile(milliseconds, [50, 99])
    return {"per_second": REQUESTS / seconds, "p50_ms": middle, "p99_ms": late, "mean_batch": mean_batch(url)}


def mean_batch(url: str) -> float:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/metrics")
    said = dict(line.rsplit(" ", 1) for line in connection.getresponse().read().decode().splitlines() if line[0] != "#")
    connection.close()
    return float(said["aegpo_reward_batch_images_sum"]) / float(said["aegpo_reward_batch_images_count"])


def measure(reward: str, clients: int, wait_ms: int) -> dict[str, float]:
    """The same of a server started for it."""
    words = [sys.executable, "-m", "aegpo.cli", "reward-server", reward, "--port", "0", "--wait-ms", str(wait_ms)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            return asked(server.stdout.readline().split()[-1], clients)
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    code = {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", ".")}
    ways = {"one client": (1, 0), "one client, --wait-ms 5": (1, 5), f"{CLIENTS} clients": (CLIENTS, 5)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, body) in enumerate(REWARDS.items()):
            path = Path(folder, f"reward_{number}.py")
            path.write_text(body)
            alone = 0.0
            for way, (clients, wait_ms) in ways.items():
                found = measure(f"{path}:score", clients, wait_ms)
                alone = alone or found["per_second"]
                rows.append({"reward": kind, "asked by": way, **found, "times_one_client": found["per_second"] / alone})
    table = Table("reward that", "asked by", "requests a second", "times one client", "mean batch", "p50 ms", "p99 ms")
    for row in rows:
        figures = f"{row['per_second']:.0f}", f"{row['times_one_client']:.2f}", f"{row['mean_batch']:.1f}"
        table.add_row(row["reward"], row["asked by"], *figures, f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}")
    Console(width=130).print(table)
    if asked.json:
        versions = {name: version(name) for name in ("aegpo", "fastapi", "uvicorn", "h11")}
        settings = {"requests": REQUESTS, "clients": CLIENTS, "side": SIDE, "cores": os.cpu_count()}
        about = code | {"versions": versions, "settings": settings}
        asked.json.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
