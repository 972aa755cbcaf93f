"""The reward server, on real sockets: nothing is lost or mixed up, whatever comes in, and however it ends."""

import base64
import io
import json
import random
import re
import socket
import struct
import sys
import threading
import time
import zlib
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from aegpo.cli import main
from aegpo.rewards import server
from aegpo.rewards.wire import TOKEN, packed
from aegpo.types import Judgement
from tests.rewards.serving import (
    JSON,
    Client,
    Process,
    in_threads,
    numbered,
    own,
    read,
    reward,
    serving,
    wait_until,
)


def png(image, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "PNG")
    return file.getvalue()


def in_json(**body):
    return json.dumps({"prompts": ["a"], "images": [base64.b64encode(png(numbered(7)[0])).decode()]} | body).encode()


# ---------------------------------------------------------------- what comes back


def test_64_clients_get_the_scores_of_their_own_images():
    calls = []
    with serving(reward(calls=calls)) as url:

        def client(number):
            random.seed(number)
            with Client(url) as asking:
                for turn in range(32 if number < 16 else 31):
                    mine = [4096 * number + 64 * turn + i for i in range(random.randint(1, 4))]
                    assert asking.score(numbered(*mine), metadata=[{"n": n} for n in mine]) == mine
            return True

        assert all(in_threads(client, *range(64)))
        with Client(url) as asking:
            said = asking.metrics()
    assert said['requests_total{status="200"}'] == 2000
    assert said["images_total"] == said["batch_images_sum"] == sum(len(images) for images, _, _ in calls)
    assert said["batch_images_count"] == said["judge_seconds_count"] == len(calls) < 1000
    assert said["queue_seconds_count"] == 2000 and said["queue_requests"] == 0
    assert max(len(images) for images, _, _ in calls) <= 64
    seen = [about["n"] for _, _, metadata in calls for about in metadata]
    assert len(seen) == len(set(seen))


def test_json_and_safetensors_say_the_same_to_the_bit_and_what_is_no_number_survives():
    scores = np.array([np.nan, np.inf, -np.inf, 0.1, -0.0, 1e-45, 3.4028235e38], np.float32)
    with serving(reward(lambda images: scores[read(images).astype(int)])) as url, Client(url) as asking:
        body = in_json(
            images=[base64.b64encode(png(image)).decode() for image in numbered(*range(7))], prompts=["a"] * 7
        )
        status, said = asking.ask(body, JSON)
        assert status == 200 and said["scores"][:3] == ["nan", "inf", "-inf"]
        assert said["reward"] == "numbers" and said["passed"] is None
        for answer in (said["scores"], asking.score(numbered(*range(7)))):
            assert np.array([float(score) for score in answer], np.float32).tobytes() == scores.tobytes()


def test_prompts_metadata_and_verdicts_stay_with_their_images():
    def judge(images, prompts, metadata):
        told = [
            f"{int(n)} {prompt} {about['x']}" for n, prompt, about in zip(read(images), prompts, metadata, strict=True)
        ]
        return Judgement(np.array([len(line) for line in told], np.float32), np.array(["é" in line for line in told]))

    with serving(server.Reward("lines", judge), wait=0.1, batch=4) as url:

        def client(number):
            with Client(url) as asking:
                body = packed(numbered(number), ["é" * (number % 2)], [{"x": "y" * number}], str(number))
                return asking.ask(body)[1]

        for number, said in enumerate(in_threads(client, *range(4))):
            assert said == {"reward": "lines", "scores": [3 + number % 2 + number], "passed": [bool(number % 2)]}
        with Client(url) as asking:
            assert asking.metrics()["batch_images_count"] == 1


def test_videos_and_pictures_of_other_sizes_never_share_a_call():
    calls = []
    with serving(reward(calls=calls), wait=0.1) as url:
        video = np.stack([numbered(10, 20, 60), numbered(1, 2, 3)])
        work = [numbered(5), numbered(6), numbered(7, size=(2, 3)), video]
        with Client(url) as a, Client(url) as b, Client(url) as c, Client(url) as d:
            said = in_threads(lambda pair: pair[0].score(pair[1]), *zip((a, b, c, d), work, strict=True))
    assert said == [[5], [6], [7], [30, 2]]
    assert sorted(len(images) for images, _, _ in calls) == [1, 2, 6]


def test_what_compares_sees_one_request_a_call():
    calls = []
    with serving(reward(lambda images: read(images) - read(images).mean(), calls, groupwise=True), wait=0.05) as url:

        def client(number):
            with Client(url) as asking:
                return asking.score(numbered(number, number + 4))

        assert in_threads(client, *range(8)) == [[-2, 2]] * 8
    assert [len(images) for images, _, _ in calls] == [2] * 8


def test_one_that_fails_does_not_fail_those_it_was_judged_with():
    def score(images):
        if (read(images) == 3).any():
            raise ValueError("no threes,\nplease")
        if (read(images) == 4).any():
            raise KeyError("four")
        return read(images)

    with serving(reward(score), wait=0.1, batch=6) as url:

        def client(number):
            with Client(url) as asking:
                return asking.ask(packed(numbered(number), ["a"], [{}], str(number)))

        said = in_threads(client, *range(6))
        with Client(url) as asking:
            assert asking.metrics()['batch_images_bucket{le="1.0"}'] == 6  # after the call of six
    assert [status for status, _ in said] == [200, 200, 200, 500, 500, 200]
    assert [said[i][1]["scores"] for i in (0, 1, 2, 5)] == [[0], [1], [2], [5]]
    assert said[3][1] == {"error": "no threes, please"} and said[4][1] == {"error": "KeyError: 'four'"}


def test_a_reward_that_answers_too_few_is_not_dealt_out():
    with serving(reward(lambda images: read(images)[1:])) as url, Client(url) as asking:
        assert asking.ask(in_json(), JSON) == (500, {"error": "reward numbers answered shape (0,) for 1 images"})


# ---------------------------------------------------------------- a request that comes again


def test_an_id_is_scored_once_whether_in_flight_or_answered(monkeypatch):
    monkeypatch.setattr(server, "KEPT", 3)
    calls = []

    def score(images):
        time.sleep(0.2)
        return read(images) + 100 * len(calls)

    with serving(reward(score, calls), wait=0) as url:

        def client(_):
            with Client(url) as asking:
                return asking.score(numbered(5), id="one")

        assert in_threads(client, *range(8)) == [[105]] * 8
        with Client(url) as asking:
            assert asking.score(numbered(5), id="one") == [105] and len(calls) == 1
            assert asking.score(numbered(5), id="two") == [205]
            refused = asking.ask(packed(numbered(6), ["a"], [{}], "one"))
            assert refused == (409, {"error": "id: 'one' is that of another request"})
            asking.score(numbered(1), id="three"), asking.score(numbered(1), id="four")
            assert asking.score(numbered(5), id="two") == [205] and len(calls) == 4
            assert asking.score(numbered(5), id="one") == [505]  # forgotten: three others came since


def test_a_failure_is_not_remembered():
    calls = []

    def score(images):
        if len(calls) == 1:
            raise ValueError("not yet")
        return read(images)

    with serving(reward(score, calls)) as url, Client(url) as asking:
        assert asking.ask(packed(numbered(5), ["a"], [{}], "one"))[0] == 500
        assert asking.score(numbered(5), id="one") == [5]


def test_what_is_not_done_in_time_can_be_asked_for_again():
    calls, free = [], threading.Event()

    def score(images):
        free.wait(10)
        return read(images)

    with serving(reward(score, calls), timeout=0.3, wait=0) as url, Client(url) as asking:
        assert asking.ask(packed(numbered(5), ["a"], [{}], "one")) == (503, {"error": "not done within 0.3 s"})
        assert asking.reply.headers["Retry-After"] == "1"
        assert asking.ask(in_json(), JSON)[0] == 503  # without an id nobody can ask for it again: it is dropped
        free.set()
        assert asking.score(numbered(5), id="one") == [5]
        assert asking.metrics()["queue_requests"] == 0
        assert len(calls) == 1


def test_a_full_queue():
    free = threading.Event()

    def score(images):
        free.wait(20)
        return read(images)

    with serving(reward(score), limit=2**16, wait=0) as url:
        large = numbered(5, size=(100, 200))

        def client(number):
            with Client(url) as asking:
                return asking.ask(packed(large, ["a"], [{}], str(number)))

        said = []
        asked = threading.Thread(target=lambda: said.extend(in_threads(client, *range(24))))
        asked.start()
        with Client(url) as asking:
            wait_until(lambda: asking.metrics().get('requests_total{status="503"}') == 24 - 2**20 // large.nbytes)
        free.set()
        asked.join()
        with Client(url) as asking:
            assert all(asking.score(large) == [5] for _ in range(20))
    assert all(answer == {"error": "too many wait already"} for status, answer in said if status == 503)
    assert [status for status, _ in said].count(200) == 2**20 // large.nbytes


# ---------------------------------------------------------------- what should not have been sent


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A PNG of so many pixels in a few bytes, as far as it goes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def with_image(data):
    return JSON, in_json(images=[base64.b64encode(data).decode()])


def with_header(text, data=bytes(12)):
    return "application/x-safetensors", struct.pack("<Q", len(text)) + text + data


def tensors(about=None, **given):
    return "application/x-safetensors", save(given or {"images": numbered(7)}, about)


GOOD = {"prompts": '["a"]', "metadata": "[{}]", "id": "x"}
SOUND, PNG = tensors(GOOD)[1], png(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
WRONG = {
    "no json": (JSON, b"{"),
    "nothing": (JSON, b""),
    "no text": (JSON, b"\xff\xfe"),
    "a list": (JSON, b"[]"),
    "null": (JSON, b"null"),
    "deep": (JSON, b'{"metadata": ' + b"[" * 100000 + b"]" * 100000 + b"}"),
    "deep objects": (JSON, b'{"a":' * 50000),
    "a long number": (JSON, b'{"id": ' + b"9" * 10000 + b"}"),
    "no images": (JSON, b'{"prompts": ["a"]}'),
    "none": (JSON, in_json(images=[], prompts=[])),
    "unknown": (JSON, in_json(image="x")),
    "a line break in a key": (JSON, in_json(**{"a\nb": 1})),
    "number as prompt": (JSON, in_json(prompts=[1])),
    "one prompt as text": (JSON, in_json(prompts="a")),
    "half a letter": (JSON, in_json().replace(b'["a"]', b'["\\ud800"]')),
    "too many prompts": (JSON, in_json(prompts=["a", "b"])),
    "too few prompts": (JSON, in_json(prompts=[])),
    "metadata of two": (JSON, in_json(metadata=[{}, {}])),
    "metadata no object": (JSON, in_json(metadata=["x"])),
    "metadata a mapping": (JSON, in_json(metadata={})),
    "id a number": (JSON, in_json(id=1)),
    "id empty": (JSON, in_json(id="")),
    "id long": (JSON, in_json(id="x" * 201)),
    "no base64": (JSON, in_json(images=["?"])),
    "base64 not of ascii": (JSON, in_json(images=["é"])),
    "too many": (JSON, in_json(images=[""] * 5000, prompts=["a"] * 5000)),
    "too many bytes": (JSON, in_json(prompts=["a" * 2**20])),
    "no png": with_image(b"GIF89a" + bytes(100)),
    "a jpeg": with_image(b"\xff\xd8\xff" + bytes(100)),
    "bomb": with_image(bomb(100000, 100000)),
    "largest": with_image(bomb(2**31 - 1, 2**31 - 1)),
    "just too large": with_image(bomb(2**20 // 3 + 1, 1)),
    "no pixel": with_image(bomb(0, 5)),
    "too short a picture": with_image(bomb(500, 500)),
    "header twice": with_image(bomb(4, 4)[:33] + bomb(5000, 5000)[8:]),
    "transparent": with_image(png(numbered(7)[0], "RGBA")),
    "grey": with_image(png(numbered(7)[0], "L")),
    "a palette": with_image(png(numbered(7)[0], "P")),
    "two sizes": (
        JSON,
        in_json(images=[base64.b64encode(png(numbered(1, size=s)[0])).decode() for s in ((2, 2), (2, 3))]),
    ),
    "as text": ("text/plain", in_json()),
    "as a form": ("multipart/form-data", in_json()),
    "as nothing": ("", in_json()),
    "json as safetensors": ("application/x-safetensors", in_json()),
    "safetensors as json": (JSON, SOUND),
    "no header": tensors(),
    "no prompts": tensors({"metadata": "[{}]"}),
    "prompts no json": tensors(GOOD | {"prompts": "a"}),
    "prompts deep": tensors(GOOD | {"prompts": "[" * 100000}),
    "unknown in the header": tensors(GOOD | {"format": "np"}),
    "another tensor": tensors(GOOD, pictures=numbered(7)),
    "two tensors": tensors(GOOD, images=numbered(7), masks=numbered(7)),
    "floats": tensors(GOOD, images=numbered(7).astype(np.float32)),
    "one picture": tensors(GOOD, images=numbered(7)[0]),
    "a number": tensors(GOOD, images=np.array(7, np.uint8)),
    "six axes": tensors(GOOD, images=numbered(7)[None, None]),
    "four channels": tensors(GOOD, images=np.zeros((1, 2, 2, 4), np.uint8)),
    "channels first": tensors(GOOD, images=np.zeros((1, 3, 2, 2), np.uint8)),
    "no rows": tensors(GOOD, images=np.zeros((1, 0, 2, 3), np.uint8)),
    "no videos": tensors(GOOD | {"prompts": "[]", "metadata": "[]"}, images=np.zeros((0, 3, 2, 2, 3), np.uint8)),
    "too many of them": tensors(GOOD, images=np.zeros((5000, 1, 1, 3), np.uint8)),
    "two for one prompt": tensors(GOOD, images=numbered(7, 8)),
    "a length without end": ("application/x-safetensors", b"\xff" * 8 + bytes(100)),
    "header not json": with_header(b"{]"),
    "offsets beyond": with_header(b'{"images":{"dtype":"U8","shape":[1,2,2,3],"data_offsets":[0,1200]}}'),
    "shape beyond": with_header(b'{"images":{"dtype":"U8","shape":[1,2,2,9999999999],"data_offsets":[0,12]}}'),
    "overflow": with_header(b'{"images":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,12]}}'),
    "unknown dtype": with_header(b'{"images":{"dtype":"PICKLE","shape":[12],"data_offsets":[0,12]}}'),
    "a dtype numpy lacks": with_header(b'{"images":{"dtype":"F8_E4M3","shape":[12],"data_offsets":[0,12]}}'),
    "deep header": with_header(b'{"a":' * 50000),
}
WRONG |= {f"cut at {n}": ("application/x-safetensors", SOUND[:n]) for n in range(0, len(SOUND), len(SOUND) // 15)}
WRONG |= {f"png cut at {n}": with_image(PNG[:n]) for n in (0, 7, 8, 20, 28, 33, 40, 60, len(PNG) - 30)}
WRONG |= {
    f"png flipped at {n}": with_image(PNG[:n] + bytes([PNG[n] ^ 255]) + PNG[n + 1 :])
    for n in (3, 14, 18, 24, 25, 30, 38, 60)
}


@pytest.fixture(scope="module")
def strict():
    with serving(reward()) as url, Client(url) as asking:
        yield asking


@pytest.mark.parametrize("what", WRONG)
def test_whatever_is_wrong_is_one_line_and_the_server_lives(what, strict):
    kind, body = WRONG[what]
    status, said = strict.ask(body, kind)
    assert 400 <= status < 500 and list(said) == ["error"]
    assert "\n" not in said["error"] and 10 < len(said["error"]) <= 500 and "Traceback" not in said["error"]
    assert strict.score(numbered(9)) == [9]


def test_there_are_a_hundred_of_them_and_what_is_sound_is_taken(strict):
    assert len(WRONG) >= 100
    assert strict.ask(SOUND)[1]["scores"] == [7] == strict.ask(in_json(), JSON)[1]["scores"]
    assert strict.ask(*with_image(PNG)[::-1])[0] == 200
    assert strict.ask(tensors({"prompts": '["a"]'})[1])[0] == 200


@pytest.mark.parametrize(
    ("what", "status", "line"),
    [
        ("bomb", 413, "images.0: 100000 x 100000 pixels are too many for one request"),
        ("too many bytes", 413, "the body is larger than the 1 MB that it may have"),
        ("unknown", 400, "image: extra inputs are not permitted"),
        ("metadata of two", 400, "metadata: 2 for 1 images; one each is due"),
        ("header twice", 400, "images.0: is a PNG of two sizes"),
        ("transparent", 400, "images.0: should be RGB, 8 bits each, not RGBA"),
        ("prompts no json", 400, "header: prompts: invalid JSON: expected value at line 1 column 1"),
        ("as text", 415, "Content-Type: should be application/json or application/x-safetensors"),
        ("floats", 400, "images: should be uint8 .*; got float32 \\(1, 2, 2, 3\\)"),
    ],
)
def test_the_line_says_what_is_wrong(what, status, line, strict):
    said = strict.ask(WRONG[what][1], WRONG[what][0])
    assert said[0] == status and re.fullmatch(line, said[1]["error"])


def test_other_routes_are_named_and_a_body_far_too_large_is_refused(strict):
    for path, method, status in (("/", "GET", 404), ("/score", "GET", 405), ("/docs", "GET", 404)):
        said = strict.ask(None, method=method, path=path)
        assert said == (status, {"error": "there are POST /score, GET /healthz and GET /metrics"})
    assert strict.ask(bytes(50 * 2**20))[0] == 413
    assert strict.score(numbered(9)) == [9]


def test_a_sender_that_goes_away_in_mid_body_or_speaks_no_http(strict):
    host, port = strict.connection.host, strict.connection.port
    for sent in (
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"x" * 200000,
    ):
        with socket.create_connection((host, port)) as raw:
            raw.sendall(sent)
            with suppress(OSError):  # who is there may have hung up by now
                raw.shutdown(socket.SHUT_WR)
            raw.settimeout(5)
            answer = raw.recv(1000)
            assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert strict.score(numbered(9)) == [9]


# ---------------------------------------------------------------- who may ask


def test_a_token_is_asked_for_but_for_health():
    with serving(reward(range=(-np.inf, 1.0)), token="s3cret") as url:
        for token, status in ((None, 401), ("s3cre", 401), ("s3cret!", 401), ("s3cret", 200)):
            with Client(url, token) as asking:
                assert asking.ask(in_json(), JSON)[0] == asking.get("/metrics")[0] == status
                assert asking.get("/healthz")[1]["range"] == [None, 1]
        with Client(url) as asking:
            status, said = asking.ask(in_json(), JSON, Authorization="Basic s3cret")
            assert status == 401 and "s3cret" not in said["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beauty"], "reward: 'beauty' is unknown"),
        (["world", "--host", "0.0.0.0"], "lets others in, so clients must know a token: set AEGPO_REWARD_TOKEN"),
        (["world", "--host", "::"], "lets others in"),
        (["world", "--host", "no.such.host.invalid", "--token-file", "TOKEN"], "cannot listen at port 0 of no.such"),
        (["world", "--port", "65536"], "cannot listen at port 65536 of 127.0.0.1: ports end at 65535"),
        (["world", "--port", "TAKEN"], "cannot listen at port [0-9]+ of 127.0.0.1: Address already in use"),
        (["world", "--token-file", "none"], "the token file none cannot be read: No such file or directory"),
        (["world", "--token-file", "EMPTY"], "empty should hold a token"),
        (["world", "--token-file", "LINES"], "lines should hold a token, letters"),
        (["world", "--batch", "0"], "--batch: must be a whole number of at least 1"),
        ([], "arguments are required: NAME"),
    ],
)
def test_what_will_not_start_is_one_line(words, message, tmp_path, capsys):
    files = {"TOKEN": "t0ken\n", "EMPTY": "\n", "LINES": "se cret\nse cret"}
    for name, text in files.items():
        (tmp_path / name.lower()).write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"TAKEN": str(taken.getsockname()[1])} | {name: str(tmp_path / name.lower()) for name in files}
        words = [places.get(word, word) for word in words]
        assert main(["reward-server", *words, *(["--port", "0"] if "--port" not in words else [])]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "se cret" not in said.err
    assert re.search(message, said.err)


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "aegpo.rewards.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["reward-server", "world"]) == 2
    assert "reward-server needs uvicorn; pip install 'aegpo[server]'" in capsys.readouterr().err


# ---------------------------------------------------------------- how it ends


def seconds(work):
    began = time.monotonic()
    work()
    return time.monotonic() - began


SLOW = """
import sys, time
import numpy as np

def score(images, prompts):
    print("torch" in sys.modules, file=sys.stderr, flush=True)
    time.sleep(float(prompts[0]))
    return images[:, 0, 0, 2]
"""


def test_sigterm_answers_what_is_in_flight_and_torch_is_never_loaded(tmp_path):
    (tmp_path / "token").write_text("t0ken\n")
    words = (own(tmp_path, SLOW), "--token-file", tmp_path / "token", "--wait-ms", 0)
    with Process(*words, **{TOKEN: "another"}) as process, Client(process.url, "t0ken") as asking:
        ended = []
        with (
            Client(process.url, "t0ken") as idle,
            socket.create_connection((urlsplit(process.url).hostname, process.port)) as half,
        ):
            assert idle.get("/healthz")[1]["status"] == "ok"
            taken = sorted(seconds(lambda: asking.get("/healthz")) for _ in range(40))
            assert taken[20] < 0.03  # 0.04, where TCP holds an answer back until the one before is acknowledged
            half.sendall(b"POST /score HTTP/1.1\r\n")
            waits = threading.Timer(0.5, lambda: ended.append(process.stop()))
            waits.start()
            assert asking.score(numbered(5, 6), prompts=["1.5", "x"]) == [5, 6]
            waits.join()
        assert ended == [(0, "", "False\n")]


def test_sigterm_does_not_wait_for_a_reward_that_hangs(tmp_path):
    with Process(own(tmp_path, SLOW), "--timeout", 1) as process, Client(process.url) as asking:
        assert asking.ask(packed(numbered(5), ["1000"], [{}], "x"))[0] == 503
        began = time.monotonic()
        assert process.stop() == (0, "", "False\n")
        assert time.monotonic() - began < 3
