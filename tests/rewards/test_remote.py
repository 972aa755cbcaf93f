"""The reward `remote` against real servers: what it says is what they would say here, whatever happens to them."""

import http.server
import json
import re
import signal
import socket
import threading
import time

import numpy as np
import pytest

from aegpo import build, rewards, world
from aegpo.config import resolve
from aegpo.rewards import remote
from aegpo.rewards.wire import TOKEN, read_token
from tests.rewards.serving import Client, Process, in_threads, numbered, own, read, reward, serving, wait_until
from tests.test_train import SMALL as TRAINED

SMALL = TRAINED | {"steps": 2}


def scores(judge, *numbers):
    return judge.judge(numbered(*numbers), ["a"] * len(numbers), [{}] * len(numbers)).score.tolist()


@pytest.fixture
def quick(monkeypatch):
    """Pauses of no more than 0.05 s."""
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.05)


# ---------------------------------------------------------------- what it says


def test_it_says_what_the_reward_says_here():
    rows = world.held_out()
    images = np.random.default_rng(0).integers(0, 256, (len(rows), 32, 32, 3), np.uint8)
    images[::2] = [240, 240, 240]
    images[::2, 4:12, 4:12] = [200, 0, 0]
    given = images, [row["prompt"] for row in rows], rows
    here = rewards.load("world")
    with serving(here) as one, serving(here) as two:
        there = rewards.load(f"remote={one}, {two}/")
        said, due = there.judge(*given), here.judge(*given)
        with Client(one) as a, Client(two) as b:
            shares = [asking.metrics()["images_total"] for asking in (a, b)]
    assert (said.score == due.score).all() and said.score.dtype == np.float32
    assert said.passed is not None and (said.passed == due.passed).all() and said.passed.dtype == bool
    assert len(set(said.score.tolist())) > 2
    assert there.range == (0, 1) and there.elsewhere and not there.groupwise
    assert sum(shares) == len(rows) and min(shares) > len(rows) / 4


def test_numbers_that_are_none_and_the_range(monkeypatch):
    odd = np.array([np.nan, -np.inf, np.inf, 0.1], np.float32)
    served = reward(lambda images: odd[read(images).astype(int)], range=(-1.5, np.inf))
    with serving(served) as url:
        there = rewards.load("remote", url=url)
        assert there.range == (-1.5, np.inf)
        said = there.judge(numbered(*range(4)), ["a"] * 4, [{}] * 4)
    assert said.score.tobytes() == odd.tobytes() and said.passed is None
    none = there.judge(np.zeros((0, 2, 2, 3), np.uint8), [], [])
    assert none.score.shape == (0,) and none.score.dtype == np.float32


def test_parts_are_neither_too_many_nor_too_large_and_none_is_empty():
    assert remote.number_of_parts(np.zeros((48, 32, 32, 3), np.uint8), 1) == 1
    assert remote.number_of_parts(np.zeros((48, 32, 32, 3), np.uint8), 3) == 3
    assert remote.number_of_parts(np.zeros((2, 32, 32, 3), np.uint8), 3) == 2
    assert remote.number_of_parts(np.zeros((129, 32, 32, 3), np.uint8), 2) == 3
    assert remote.number_of_parts(np.broadcast_to(np.uint8(0), (48, 1024, 1024, 3)), 1) == 9  # 16 MiB hold 5.3 of them


def test_a_call_of_many_images_from_many_threads_comes_back_in_order():
    calls = []
    with serving(reward(calls=calls)) as one, serving(reward(calls=calls)) as two:
        there = rewards.load(f"remote={one},{two}")

        def ask(number):
            mine = [1000 * number + i for i in range(300)]
            return scores(there, *mine) == mine

        assert all(in_threads(ask, *range(8)))
    assert sum(len(images) for images, _, _ in calls) == 2400


def test_videos_are_judged_there():
    calls = []
    video = np.stack([numbered(10, 20, 60), numbered(1, 2, 3)])
    with serving(reward(calls=calls)) as url:
        said = rewards.load(f"remote={url}").judge(video, ["a", "b"], [{}, {"x": 1}])
    assert said.score.tolist() == [30, 2]
    assert [len(images) for images, _, _ in calls] == [6]


def test_what_compares_sees_the_whole_group(monkeypatch):
    monkeypatch.setattr(remote, "PART_IMAGES", 2)
    served = reward(lambda images: read(images) - read(images).max(), groupwise=True)
    with serving(served) as one, serving(served) as two:
        there = rewards.load(f"remote={one},{two}")
        assert there.groupwise
        assert in_threads(lambda n: scores(there, n, n + 1, n + 2, n + 9), 0, 10, 20) == [[-9, -8, -7, 0]] * 3


# ---------------------------------------------------------------- servers that are away


def test_one_of_two_that_dies_is_done_without(tmp_path, quick):
    body = "def score(images, prompts): return images[:, 0, 0, 2]\n"
    name = own(tmp_path, body)
    with Process(name) as one, Process(name) as two:
        there = rewards.load(f"remote={one.url},{two.url}", patience=20)
        assert scores(there, *range(200)) == list(range(200))
        assert one.stop(signal.SIGKILL)[0] == -signal.SIGKILL
        for _ in range(5):
            assert scores(there, *range(200)) == list(range(200))
        with Client(two.url) as asking:
            assert asking.metrics()["images_total"] >= 1000


def test_one_that_is_killed_while_it_judges_and_started_again(tmp_path):
    slow = "import time\n\ndef score(images, prompts):\n    time.sleep(1)\n    return images[:, 0, 0, 2]\n"
    with Process(own(tmp_path, slow)) as process:
        there = rewards.load(f"remote={process.url}", patience=30)
        said = []
        asked = threading.Thread(target=lambda: said.append(scores(there, 1, 2, 3)))
        asked.start()
        time.sleep(0.4)
        process.stop(signal.SIGKILL)
        process.start(process.port)
        asked.join(20)
        assert said == [[1, 2, 3]]


def test_patience_ends_in_one_line(tmp_path, quick):
    with serving(reward()) as url:
        there = rewards.load("remote", url=url, patience=0.4)
    began = time.monotonic()
    with pytest.raises(ValueError) as raised:
        scores(there, 1)
    assert 0.3 < time.monotonic() - began < 3
    assert re.fullmatch(
        f"reward: remote: no server could be asked for 0.4 s; the last, {url}, could not be reached: "
        "All connection attempts failed",
        str(raised.value),
    )


def test_a_slow_one_is_asked_again_and_scores_once(quick):
    calls = []

    def score(images):
        time.sleep(1.5)
        return read(images)

    with serving(reward(score, calls), timeout=0.2) as url:
        began = time.monotonic()
        assert scores(rewards.load("remote", url=url, patience=20), 1, 2) == [1, 2]
        assert 1.5 < time.monotonic() - began < 5
        with Client(url) as asking:
            assert asking.metrics()['requests_total{status="503"}'] == 2  # 1 s apart, as its Retry-After says
    assert len(calls) == 1


def test_one_that_never_answers_is_timed_out(quick):
    with serving(reward()) as url, socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        asking = remote.Remote(
            [address], remote.Health(reward="numbers", range=(0, 1), groupwise=False), None, 0.3, 0.1
        )
        with pytest.raises(ValueError, match=f"the last, {address}, could not be reached: ReadTimeout"):
            asking.judge(numbered(1), ["a"], [{}])
        both = remote.Remote(
            [address, url], remote.Health(reward="numbers", range=(0, 1), groupwise=False), None, 0.3, 9
        )
        assert both.judge(numbered(1, 2), ["a"] * 2, [{}] * 2).score.tolist() == [1, 2]


def test_what_fails_here_fails_at_once_and_is_not_asked_again():
    calls = []

    def score(images):
        raise ValueError("reward numbers failed at my.py, line 3: KeyError: 'x'")

    with serving(reward(score, calls)) as url:
        there = rewards.load(f"remote={url}", patience=2)
        with pytest.raises(ValueError) as raised:
            scores(there, 1)
        assert str(raised.value) == (
            f"reward: remote: {url} answered 500: reward numbers failed at my.py, line 3: KeyError: 'x'"
        )
        assert len(calls) == 1
        with pytest.raises(ValueError, match=f"^reward: remote: {url} answered 413: the body is larger than the 1 MB"):
            there.judge(np.zeros((2, 600, 600, 3), np.uint8), ["a"] * 2, [{}] * 2)
        with pytest.raises(ValueError, match=r"the prompts' metadata cannot be sent: .* not JSON serializable"):
            there.judge(numbered(1), ["a"], [{"x": {1, 2}}])


# ---------------------------------------------------------------- tokens


def test_a_token_from_the_environment_or_a_file(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    with serving(reward(), token="s3cret") as url:
        assert scores(rewards.load("remote", url=url, token_file=str(tmp_path / "token")), 5) == [5]
        with pytest.raises(ValueError, match=f"{url} answered 401: a token is needed, .* {TOKEN} should hold it"):
            scores(rewards.load("remote", url=url), 5)
        monkeypatch.setenv(TOKEN, "s3cret")
        assert scores(rewards.load("remote", url=url), 5) == [5]
        monkeypatch.setenv(TOKEN, "wr0ng")
        with pytest.raises(ValueError, match="answered 401") as raised:
            scores(rewards.load("remote", url=url), 5)
        assert "wr0ng" not in str(raised.value) and "s3cret" not in str(raised.value)


@pytest.mark.parametrize("token", ["", "two words", "a\nb", "clé", "\x7f"])
def test_what_cannot_be_a_token_is_not_repeated(token, monkeypatch):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(ValueError, match=f"^{TOKEN} should hold a token") as raised:
        read_token(None)
    assert not token or token not in str(raised.value)


# ---------------------------------------------------------------- what a user gets wrong


class Other(http.server.BaseHTTPRequestHandler):
    """Something that is no reward server."""

    def do_GET(self):
        self.send_response(200 if self.path == "/page/healthz" else 404)
        self.end_headers()
        self.wfile.write(b"<html>hello")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def other():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1 could not be reached: .*; is `aegpo reward-server` running there?"),
        ("http://no.such.host.invalid:1", "could not be reached: .*; is `aegpo reward-server` running there?"),
        ("OTHER", "answered 404: <html>hello; is `aegpo reward-server` running there?"),
        ("OTHER/page", "answers, but not as a reward server does; is `aegpo"),
        ("127.0.0.1:8123", "'127.0.0.1:8123' should be a URL such as http://127.0.0.1:8123"),
        ("ftp://host", "'ftp://host' should be a URL"),
        ("http://", "'http://' should be a URL"),
        ("http://a,", "'' should be a URL"),
        ("http://a:x", "'http://a:x' is not a URL"),
        ("http://user:s3cret@host", "a URL must not hold a password; a token goes into AEGPO_REWARD_TOKEN"),
    ],
)
def test_what_is_no_server(url, message, other):
    urls = url if url != "http://a," else f"{other}/page,"
    with pytest.raises(ValueError) as raised:
        rewards.load("remote", url=urls.replace("OTHER", other), timeout=5)
    said = str(raised.value)
    assert said.startswith("reward: remote: ") and re.search(message.replace("there?", r"there\?$"), said)
    assert "\n" not in said and "s3cret" not in said


def test_two_that_serve_different_rewards():
    with serving(reward()) as one, serving(reward(range=(0.0, 1.0))) as two:
        line = f"{one} serves numbers [-inf, inf], and {two} serves numbers [0.0, 1.0]; they should serve the same"
        with pytest.raises(ValueError, match=re.escape(f"reward: remote: {line}")):
            rewards.load(f"remote={one},{two}")


def test_one_that_serves_another_reward_after_a_while(quick):
    with serving(reward()) as url:
        there = rewards.load(f"remote={url}")
    port = int(url.rsplit(":", 1)[1])
    with Process("world", port=port), pytest.raises(ValueError, match=f"{url} served numbers and now serves world$"):
        there.judge(numbered(1), ["a ring"], [{}])


@pytest.mark.parametrize(("timeout", "patience"), [(0, 1), (-1, 1), (1, -1), (float("nan"), 1)])
def test_seconds_that_are_none(timeout, patience):
    with pytest.raises(ValueError, match="timeout and patience are seconds"):
        rewards.load("remote", url="http://127.0.0.1:1", timeout=timeout, patience=patience)


# ---------------------------------------------------------------- a training run


def test_no_proxy_reads_the_token_where_nothing_is_encrypted(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    with serving(reward()) as url:
        assert scores(rewards.load(f"remote={url}", timeout=5), 3, 5) == [3, 5]


def test_a_run_goes_on_when_its_server_is_killed_and_is_the_run_it_would_have_been(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remote, "QUIET", 0.0)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.held_out()[::24]))

    def run(name, served):
        about = {"prompts": {"eval": str(tmp_path / "few.jsonl")}, "output_dir": str(tmp_path / name), "reward": served}
        build.fit(resolve(SMALL, about))

    def metrics(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    run("here", "world")
    kills = []
    with Process("world") as process:

        def trouble():
            for steps in (1, 2):  # after the first evaluation, and after the first step
                file = tmp_path / "there" / "metrics.jsonl"
                wait_until(lambda file=file, steps=steps: file.exists() and file.read_text().count("\n") == steps, 60)
                kills.append(process.stop(signal.SIGKILL)[0])
                time.sleep(0.3)
                process.start(process.port)

        troubling = threading.Thread(target=trouble)
        troubling.start()
        run("there", f"remote={process.url}")
        troubling.join(60)
    assert kills == [-signal.SIGKILL] * 2
    said = capsys.readouterr().err
    assert f"reward: remote: waiting for {process.url}, up to 300 s: it could not be reached: " in said
    assert said.count("waiting for") == said.count(f"{process.url} answers again") == 2
    assert metrics("there") == metrics("here") and len(metrics("here")) == 3
