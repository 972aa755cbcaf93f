"""A judge over HTTP, against a server of this machine that decodes the pictures and answers by their brightness."""

import asyncio
import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from aegpo import rewards
from aegpo.rewards import chat
from aegpo.rewards.vlm import score_in, winner_in, won

KEY = "sk-quite-secret-1234567890"
UNIFIED = "Caption: [{prompt}]. Assign a score from 1 to 5 after 'Final Score:'."  # as UnifiedReward is asked


class Server(ThreadingHTTPServer):
    """Speaks chat completions; `answer`, of a request that it records, may be replaced: what it gives is sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models = {"object": "list", "data": [{"id": "judge"}, {"id": "other-judge"}]}
        self.answer = by_brightness
        self.asked, self.headers, self.lock, self.now, self.most = [], [], threading.Lock(), 0, 0

    def count(self, brightness):
        return sum(request["brightness"] == [brightness] for request in self.asked)

    def handle_error(self, request, client_address):
        pass  # who asks may have gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        self.server.headers.append(dict(self.headers))
        if self.path == "/v1/models" and self.server.models:
            self.send(200, self.server.models)
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.send(404, {"detail": "Not Found"})
        *pictures, text = body["messages"][0]["content"]
        request = body | {"text": text["text"], "pictures": [decoded(part["image_url"]["url"]) for part in pictures]}
        request["brightness"] = [round(picture.mean()) for picture in request["pictures"]]
        with self.server.lock:
            self.server.asked.append(request)
            self.server.headers.append(dict(self.headers))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            answer = self.server.answer(request)
        finally:
            with self.server.lock:
                self.server.now -= 1
        if answer is None:
            self.close_connection = True
        else:
            self.send(*answer)
        return None

    def send(self, status, content, headers=()):
        if isinstance(content, Iterator):
            return self.drip(content)
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(sent)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        return self.wfile.write(sent)

    def drip(self, parts):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def log_message(self, *_):
        pass


def decoded(address):
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.format == "PNG"
    return np.asarray(picture)


def says(text, finish="stop"):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def by_brightness(request):
    return says(json.dumps({"score": request["brightness"][0] / 20}))


def brighter(request):
    """A judge of pairs, who takes the first where the difference is less than 20."""
    first, second = request["brightness"]
    return says(json.dumps({"better": "second" if second - first >= 20 else "first"}))


def flat(*levels, size=8):
    return np.stack([np.full((size, size + 1, 3), level, np.uint8) for level in levels])


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in (chat.KEY, chat.OPENAI_KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(chat, "PAUSE", 0.01)
    with serving() as server:
        yield server


@pytest.fixture
def other():
    with serving() as other:
        yield other


def loaded(server, **settings):
    return rewards.load("vlm", **{"url": server.url, "model": "judge", **settings})


def score(reward, images, prompts=None):
    return reward.judge(images, prompts or ["a ring"] * len(images), [{}] * len(images)).score


def test_scores_are_the_judges_of_just_these_pictures(server):
    reward = loaded(server)
    assert (reward.range, reward.groupwise, reward.elsewhere) == ((1, 10), False, True)
    noise = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3)).astype(np.uint8)
    noise[1] //= 2
    said = score(reward, noise, ["a", "b", "c"])
    assert said.dtype == np.float32
    assert said == pytest.approx([round(picture.mean()) / 20 for picture in noise])
    seen = {request["text"].split("Prompt: ")[1][0]: request["pictures"][0] for request in server.asked}
    assert all((seen[prompt] == picture).all() for prompt, picture in zip("abc", noise, strict=True))


def test_what_is_asked(server):
    score(
        loaded(server, lowest=0, highest=2.5, question="{lowest}-{highest}: {prompt}?"), flat(40), ['{lowest} "{x}" {']
    )
    (request,) = server.asked
    assert request["text"] == '0-2.5: {lowest} "{x}" {?'
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge", 0, 2048)
    schema = request["response_format"]["json_schema"]
    assert (request["response_format"]["type"], schema["strict"]) == ("json_schema", True)
    assert schema["schema"] == {
        **{"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"]},
        "additionalProperties": False,
    }


def test_the_default_questions_have_prompt_and_scale_in_them(server):
    score(loaded(server, lowest=0, highest=5), flat(40), ["two {red} rings"])
    assert "Prompt: two {red} rings\n" in server.asked[0]["text"]
    assert re.search(r"from 0, .* to 5, ", server.asked[0]["text"])
    server.answer = brighter
    score(loaded(server, pairs=True), flat(40, 80), ["two {red} rings"] * 2)
    assert "Prompt: two {red} rings\n" in server.asked[1]["text"]


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ('{"score": 7.5}', 7.5),
        ('```json\n{"score": 7}\n```', 7),
        ('The form is {"score": NUMBER}; I say {"why": "{good}", "score": 6}.', 6),
        ('{"result": {"score": 3}}', 3),
        ('{"score": 3}, or rather {"score": 5}', 5),
        ('{"score": "8"}', 8),
        ('<think>Not bad, score 9? Or {"score": 2}?</think>\n{"score": 4}', 4),
        ("It may be a score: 3.</think>Score: 5", 5),
        ("ring (object): 1\nred (attribute): 0\nFinal Score: 4.5", 4.5),
        ("Alignment Score: 2\n**Final Score:** 3.5/5", 3.5),
        ("Score (1-10): 7", 7),
        ("I give it a score of 8 out of 10.", 8),
        ("The score is -2.", -2),
        ("Score: 1 to 10. Final score: 6", 6),
        ("8/10", 8),
        ("**9**", 9),
        ("Score: 1-10", None),
        ("<think>Some score 4? Let me see", None),
        ("<think>score: 4</think> I cannot say.", None),
        ("There are 3 rings.", None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": ' + "[" * 5000, None),
        ("", None),
    ],
)
def test_a_score_is_found_in_an_answer(text, due):
    assert score_in(text) == due


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ('{"better": "first"}', 1),
        ('I say {"better": "second"}.', 0),
        ('{"better": "neither"}', 0.5),
        ('<think>{"better": "first"}</think>{"better": "second"}', 0),
        ("Image 1 is blurred. Image 2 is better than Image 1.", 0),
        ("<think>Image 2 is better?</think><answer>Image 1 is better</answer>", 1),
        ("The second picture is slightly better.", 0),
        ("By its light, image 1 is better. On the whole, image 2 is better.", 0),
        ("Both images are equally good.", 0.5),
        ("Neither image is better.", 0.5),
        ("First.", 1),
        ("**Image 2**", 0),
        ("Image 1 is not better.", None),
        ('{"better": "third"}', None),
        ('{"better": 1}', None),
        ("", None),
    ],
)
def test_a_winner_is_found_in_an_answer(text, due):
    assert winner_in(text) == due


@pytest.mark.parametrize(
    "wrong",
    [
        says("A fine picture."),
        says('{"score": 7', finish="length"),
        says('{"score": 11}'),
        says('{"score": 0.99}'),
        says('{"score": NaN}'),
        says('{"rating": 7}'),
        says(None),
        (200, {"choices": []}),
        (200, {"result": "7"}),
        (200, [7]),
        (200, b"<html><body>Score: 7</body></html>"),
        (200, b'{"choices": [{"mess'),
        (400, {"error": {"message": "The request was filtered", "code": "content_filter"}}),
    ],
)
def test_an_image_without_a_usable_answer_is_nan_and_the_others_are_not(server, wrong):
    server.answer = lambda request: wrong if request["brightness"] == [100] else by_brightness(request)
    said = score(loaded(server, retries=2), flat(60, 100, 140))
    assert said.tolist() == [3, pytest.approx(np.nan, nan_ok=True), 7]
    assert server.count(60) == server.count(140) == 1
    assert server.count(100) == 3


def test_it_is_asked_again_otherwise_than_before(server):
    answers = iter([says("Hm."), says('{"score": 70}'), says('{"score": 7}')])
    server.answer = lambda request: next(answers)
    assert score(loaded(server), flat(100)).tolist() == [7]
    assert [request["temperature"] for request in server.asked] == [0, 0.7, 0.7]


def test_no_answer_is_asked_for_again_in_a_later_call(server):
    server.answer = lambda request: says("Hm.")
    reward = loaded(server, retries=0)
    assert np.isnan(score(reward, flat(100)))
    server.answer = by_brightness
    assert score(reward, flat(100)).tolist() == [5]


@pytest.mark.parametrize(
    "refusal", [(400, {"error": {"message": "bad request"}}), (422, {"detail": "response_format"})]
)
def test_a_server_that_knows_no_schema_is_asked_without_it_from_then_on(server, refusal):
    server.answer = lambda request: (
        refusal if "response_format" in request else says(f"Final Score: {request['brightness'][0] / 20}")
    )
    reward = loaded(server, concurrency=1)
    assert score(reward, flat(60, 100)).tolist() == [3, 5]
    assert ["response_format" in request for request in server.asked] == [True, False, False]
    assert score(reward, flat(80)).tolist() == [4]
    assert "response_format" not in server.asked[-1]
    assert server.asked[-1]["max_tokens"] == 2048


def test_a_server_that_fails_over_the_schema(server):
    trouble = 500, {"error": {"message": 'response_format type must be one of "text" or "json_object"'}}
    server.answer = lambda request: trouble if "response_format" in request else by_brightness(request)
    assert score(loaded(server), flat(60)).tolist() == [3]
    assert len(server.asked) == 2


def test_a_model_that_will_not_have_temperature_and_max_tokens(server):
    def answer(request):
        for name in ("max_tokens", "temperature"):
            if name in request:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}}
        return by_brightness(request)

    server.answer = answer
    assert score(loaded(server), flat(60)).tolist() == [3]
    assert "response_format" in server.asked[-1]
    assert server.asked[-1]["max_completion_tokens"] == 2048


def test_what_is_refused_for_another_reason_is_not_held_against_the_schema(server):
    server.answer = lambda request: (400, {"error": {"message": "the picture is\n too large"}})
    reward = loaded(server)
    with pytest.raises(ValueError, match=r"^reward: vlm: http://.*/v1 answers 400: the picture is too large$"):
        score(reward, flat(60))
    server.answer = by_brightness
    score(reward, flat(60))
    assert "response_format" in server.asked[-1]


def test_a_question_that_says_how_to_score_is_answered_freely(server):
    server.answer = lambda request: says(f"ring (object): 1\nFinal Score: {request['brightness'][0] / 50}")
    reward = loaded(server, question=UNIFIED, highest=5)
    assert score(reward, flat(100, 225), ["a ring", "a {ring}"]) == pytest.approx([2, 4.5])
    assert not any("response_format" in request for request in server.asked)
    assert {request["text"] for request in server.asked} == {
        UNIFIED.replace("{prompt}", prompt) for prompt in ("a ring", "a {ring}")
    }


@pytest.mark.parametrize("trouble", [(500, {"error": "busy"}), (429, b"slow down"), (408, b""), (503, b"<html>"), None])
def test_what_passes_is_tried_again(server, trouble):
    answers = iter([trouble, trouble])
    server.answer = lambda request: next(answers, by_brightness(request))
    assert score(loaded(server, retries=2), flat(60)).tolist() == [3]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ((500, {"error": {"message": "out of memory"}}), r"answers 500: out of memory \(tries: 3\)"),
        ((429, {"message": "slow down"}), r"answers 429: slow down \(tries: 3\)"),
        ((502, b""), r"answers 502 \(tries: 3\)"),
        (None, r"breaks off: .* \(tries: 3\)"),
    ],
)
def test_what_does_not_pass_is_an_error(server, trouble, message):
    server.answer = lambda request: trouble
    with pytest.raises(ValueError, match=f"^reward: vlm: http://.*/v1 {message}$"):
        score(loaded(server, retries=2), flat(60))
    assert len(server.asked) == 3


def test_pauses_grow_twofold_up_to_the_longest_and_are_drawn_from_nothing_up(server, monkeypatch):
    drawn = []
    monkeypatch.setattr(chat.jitter, "uniform", lambda low, high: drawn.append((low, high)) or 0.0)
    monkeypatch.setattr(chat, "LONGEST_PAUSE", 0.05)
    server.answer = lambda request: (500, b"")
    with pytest.raises(ValueError, match=r"\(tries: 6\)$"):
        score(loaded(server, retries=5), flat(60))
    assert drawn == [(0, 0.01), (0, 0.02), (0, 0.04), (0, 0.05), (0, 0.05)]


@pytest.mark.parametrize("value", ["0.4", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_it_waits_as_long_as_the_server_asks(server, value):
    times = []

    def answer(request):
        times.append(time.monotonic())
        asks = {"Retry-After": value() if callable(value) else value}
        return (429, b"", asks) if len(times) == 1 else by_brightness(request)

    server.answer = answer
    assert score(loaded(server), flat(60)).tolist() == [3]
    assert times[1] - times[0] > (0.9 if callable(value) else 0.39)


@pytest.mark.parametrize("value", ["soon", "", "-5", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_server_that_asks_for_no_wait(server, value):
    answers = iter([(429, b"", {"Retry-After": value})])
    server.answer = lambda request: next(answers, by_brightness(request))
    start = time.monotonic()
    assert score(loaded(server), flat(60)).tolist() == [3]
    assert time.monotonic() - start < 2


def test_a_server_that_asks_for_an_hour(server):
    server.answer = lambda request: (429, {"error": "quota"}, {"Retry-After": "3600"})
    with pytest.raises(ValueError, match=r"answers 429: quota, and asks to wait 3600 s$"):
        score(loaded(server), flat(60))
    assert len(server.asked) == 1


def test_a_server_that_hangs_is_given_up_after_the_timeout(server):
    over = threading.Event()
    server.answer = lambda request: over.wait(10) and None
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"gives no answer within 0.2 s \(tries: 2\)$"):
        score(loaded(server, timeout=0.2, retries=1), flat(60))
    assert 0.4 < time.monotonic() - start < 2
    over.set()


def test_a_server_that_gives_its_answer_in_drops_is_given_up_too(server):
    over = threading.Event()
    server.answer = lambda request: (200, (b" " for _ in iter(lambda: over.wait(0.05), True)))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"gives no answer within 0.3 s \(tries: 1\)$"):
        score(loaded(server, timeout=0.3, retries=0), flat(60))
    assert time.monotonic() - start < 2
    over.set()


def test_a_server_that_hangs_once_is_asked_again(server):
    over = threading.Event()

    def answer(request):
        return over.wait(10) and None if len(server.asked) == 1 else by_brightness(request)

    server.answer = answer
    assert score(loaded(server, timeout=0.3), flat(60)).tolist() == [3]
    over.set()


def test_an_error_calls_the_others_off(server):
    over = threading.Event()

    def answer(request):
        if request["brightness"] == [100]:
            return 404, {"error": {"message": "The model `judge` does not exist."}}
        return over.wait(10) and None

    server.answer = answer
    reward, start = loaded(server, concurrency=3), time.monotonic()
    with pytest.raises(ValueError, match=r"answers 404: The model `judge` does not exist.; url should be the base, .*"):
        score(reward, flat(60, 100, *range(140, 150)))
    assert time.monotonic() - start < 3
    over.set()
    assert len(server.asked) <= 3


def test_as_many_are_asked_at_once_as_may_be_by_all_threads_together(server):
    def answer(request):
        time.sleep(0.1)
        return by_brightness(request)

    server.answer = answer
    reward = loaded(server, concurrency=4)
    images = flat(*range(40, 160, 10))
    start = time.monotonic()
    assert score(reward, images) == pytest.approx(np.arange(2, 8, 0.5))
    assert time.monotonic() - start < 1.0  # one after the other, 1.2
    assert server.most == 4
    with ThreadPoolExecutor(3) as threads:
        said = list(threads.map(lambda prompt: score(reward, images, [prompt] * 12), ("a", "b", "c")))
    assert [list(scores) for scores in said] == [pytest.approx(np.arange(2, 8, 0.5))] * 3
    assert server.most == 4
    assert len(server.asked) == 48


def test_it_may_be_asked_where_an_event_loop_runs_already(server):
    async def asks():
        return score(loaded(server), flat(60, 100))

    assert asyncio.run(asks()).tolist() == [3, 5]


def test_what_was_asked_is_not_asked_again(server):
    reward = loaded(server)
    images = flat(60, 100, 60, 60)
    assert score(reward, images, ["a", "a", "b", "a"]).tolist() == [3, 5, 3, 3]
    assert len(server.asked) == 3
    assert score(reward, images, ["a", "a", "b", "a"]).tolist() == [3, 5, 3, 3]
    assert len(server.asked) == 3
    score(reward, images.transpose(0, 2, 1, 3), ["a"] * 4)  # the same bytes, of another shape
    assert len(server.asked) == 5


def test_a_folder_keeps_answers_for_the_next_run(server, tmp_path):
    folder = tmp_path / "some" / "answers"
    settings = {"cache": str(folder), "question": "{prompt}?"}
    assert score(loaded(server, **settings), flat(60, 100)).tolist() == [3, 5]
    assert sorted(json.loads(file.read_text())["answer"] for file in folder.iterdir()) == [3, 5]
    assert all(re.fullmatch(r"[0-9a-f]{64}\.json", file.name) for file in folder.iterdir())
    assert score(loaded(server, **settings), flat(60, 100, 140)).tolist() == [3, 5, 7]
    assert len(server.asked) == 3
    for other in ({"model": "other-judge"}, {"question": "{prompt}!"}, {"highest": 9}):
        score(loaded(server, **settings | other), flat(60))
    assert len(server.asked) == 6


def test_an_answer_is_kept_where_it_was_asked_of_another_place(server, tmp_path):
    reward = loaded(server, cache=str(tmp_path))
    score(reward, flat(60))
    server.url = server.url.replace("127.0.0.1", "localhost")
    assert score(loaded(server, cache=str(tmp_path)), flat(60)).tolist() == [3]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "damage", ["", '{"answer": 3', "[3]", "null", '{"answer": "3"}', '{"answer": 11}', '{"score": 3}']
)
def test_a_damaged_answer_is_asked_for_and_written_again(server, tmp_path, damage):
    reward = loaded(server, cache=str(tmp_path))
    score(reward, flat(60))
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    assert score(reward, flat(60)).tolist() == [3]
    assert len(server.asked) == 2
    assert json.loads(file.read_text()) == {"answer": 3}


def test_a_folder_that_is_none(server, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/inside"):
        with pytest.raises(ValueError, match=f"^reward: vlm: cache: .*/{folder} cannot be used as a folder: "):
            loaded(server, cache=str(tmp_path / folder))


def test_the_key_goes_into_the_header_and_nowhere_else(server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    monkeypatch.setenv("AEGPO_VLM_KEY", KEY)
    score(loaded(server, cache=str(tmp_path)), flat(60))
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2
    assert KEY not in json.dumps(server.asked, default=str) + "".join(path.read_text() for path in tmp_path.iterdir())


def test_openais_own_key_is_for_openai_alone(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    score(loaded(server), flat(60))
    assert not any("Authorization" in headers for headers in server.headers)
    assert chat._key("https://api.openai.com/v1") == ("OPENAI_API_KEY", "sk-another")
    assert chat._key("https://api.openai.com.evil.org/v1") == chat._key("http://api.openai.com/v1") == ("", "")


def test_without_a_key_none_is_sent(server):
    score(loaded(server), flat(60))
    assert not any("Authorization" in headers for headers in server.headers)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY[:8]}"}}), r"refuses the key in .*_KEY \(401\)"),
        ((500, {"error": {"message": f"Bearer {KEY} is odd"}}), "answers 500: Bearer KEY is odd .*"),
        ((400, f"no {KEY}".encode()), "answers 400: no KEY"),
        ((200, b""), None),
    ],
)
def test_no_error_tells_the_key(server, monkeypatch, answer, message):
    monkeypatch.setenv("AEGPO_VLM_KEY", KEY)
    server.answer = lambda request: answer
    reward = loaded(server, retries=1)
    if message is None:
        assert np.isnan(score(reward, flat(60)))
        return
    with pytest.raises(ValueError, match=f"^reward: vlm: http://.* {message}$") as raised:
        score(reward, flat(60))
    assert KEY[:8] not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"{KEY} {KEY}", f"{KEY}é"])
def test_what_cannot_be_a_key(server, monkeypatch, key):
    monkeypatch.setenv("AEGPO_VLM_KEY", key)
    with pytest.raises(
        ValueError, match=r"^reward: vlm: what AEGPO_VLM_KEY has in the environment is no key"
    ) as raised:
        loaded(server)
    assert KEY not in str(raised.value)


def test_the_key_does_not_follow_where_the_server_points_or_to_a_proxy(server, other, monkeypatch):
    monkeypatch.setenv("AEGPO_VLM_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", other.url.removesuffix("/v1"))
    server.answer = lambda request: (307, b"", {"Location": f"{other.url}/chat/completions"})
    with pytest.raises(ValueError, match=r"points elsewhere \(307\), where nobody is asked$"):
        score(loaded(server), flat(60))
    assert other.headers == []


def test_a_server_that_wants_a_key(server):
    server.answer = lambda request: (401, b"")
    with pytest.raises(ValueError, match=r"/v1 wants a key, in AEGPO_VLM_KEY \(401\)$"):
        score(loaded(server), flat(60))


def test_a_model_that_is_not_there(server):
    with pytest.raises(ValueError) as raised:
        loaded(server, model="juge")
    assert str(raised.value) == (
        f"reward: vlm: {server.url} has no model 'juge'; it has judge, other-judge; did you mean judge?"
    )
    assert server.asked == []


@pytest.mark.parametrize(
    "models",
    [
        None,
        [],
        {},
        {"data": []},
        {"data": [{"name": "x"}]},
        {"data": None},
        b"<html>",
        {"data": [{"id": "judge:latest"}]},
    ],
)
def test_a_server_without_a_list_of_models_is_let_be(server, models):
    server.models = models
    assert score(loaded(server), flat(60)).tolist() == [3]


def test_a_server_that_is_not_there(server):
    gone = Server()
    gone.server_close()
    with pytest.raises(ValueError, match=rf"^reward: vlm: {gone.url} cannot be reached: .*; url should be the base of"):
        loaded(gone)
    reward = loaded(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=rf"^reward: vlm: {server.url} cannot be reached: "):
        score(reward, flat(60))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "url: should be as http://localhost:8000/v1, got 'localhost:8000'"),
        ({"url": "ftp://host/v1"}, "url: should be as http"),
        ({"url": "http://"}, "url: should be as http"),
        ({"url": "http://[::1/v1"}, "url: should be as http"),
        ({"url": f"http://me:{KEY}@host/v1"}, r"url: should be no more than the base, without \?, # and @; .*KEY$"),
        ({"url": f"http://host/v1?key={KEY}"}, "url: should be no more than the base"),
        ({"lowest": 10}, "lowest should be less than highest, got 10 and 10"),
        ({"highest": float("inf")}, "lowest should be less than highest"),
        ({"lowest": float("nan")}, "lowest should be less than highest"),
        ({"concurrency": 0}, "concurrency: should be 1 or more, got 0"),
        ({"retries": -1}, "retries: should be 0 or more, got -1"),
        ({"timeout": 0}, "timeout: should be more than 0 seconds, got 0"),
        ({"pears": True}, "no setting 'pears'; .*; did you mean pairs?"),
    ],
)
def test_settings_that_make_no_sense(server, settings, message):
    with pytest.raises(ValueError, match=f"^reward: vlm.*{message}") as raised:
        loaded(server, **settings)
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_pictures_ask_nothing(server):
    assert score(loaded(server), np.zeros((0, 8, 8, 3), np.uint8)).shape == (0,)
    assert score(loaded(server, pairs=True), np.zeros((0, 8, 8, 3), np.uint8)).shape == (0,)
    assert server.asked == []


def test_videos_are_judged_by_their_frames(server):
    video = np.stack([flat(40, 60, 80), flat(100, 120, 140)])
    assert score(loaded(server), video).tolist() == [3, 6]


def test_of_pairs_a_score_is_how_often_an_image_wins(server):
    server.answer = brighter
    reward = loaded(server, pairs=True)
    assert (reward.range, reward.groupwise, reward.elsewhere) == ((0, 1), True, True)
    # 100 and 110 are within 20: the judge takes what comes first, so each wins once in two. 200 beats all; 40 none.
    assert score(reward, flat(100, 40, 200, 110)) == pytest.approx([1.5 / 3, 0, 1, 1.5 / 3])
    orders = {tuple(request["brightness"]) for request in server.asked}
    assert len(orders) == len(server.asked) == 12
    assert all(
        request["response_format"]["json_schema"]["schema"]["required"] == ["better"] for request in server.asked
    )


def test_of_pairs_the_order_of_the_images_makes_no_difference(server):
    server.answer = brighter
    images = flat(100, 40, 200, 110, 90)
    order = [3, 1, 4, 0, 2]
    there = score(loaded(server, pairs=True), images)
    assert score(loaded(server, pairs=True), images[order]) == pytest.approx(there[order])


def test_of_pairs_one_that_is_alone_is_neither_good_nor_bad(server):
    assert score(loaded(server, pairs=True), flat(60)).tolist() == [0.5]
    assert server.asked == []


def test_of_pairs_images_that_are_the_same_share_the_win(server):
    server.answer = brighter
    assert score(loaded(server, pairs=True), flat(60, 60)).tolist() == [0.5, 0.5]
    assert len(server.asked) == 1


def test_of_pairs_a_hopeless_image_does_not_count_for_the_others(server):
    server.answer = lambda request: says("Hm.") if 100 in request["brightness"] else brighter(request)
    said = score(loaded(server, pairs=True, retries=0), flat(60, 100, 140, 200))
    assert said.tolist() == [0, pytest.approx(np.nan, nan_ok=True), 0.5, 1]


def test_a_pair_that_lacks_one_order_does_not_count():
    orders = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    said = won(orders, np.array([1, np.nan, 0.5, 1, 1, 0]), 3)  # by hand: 0 over 1 by 0.75; 1 over 2 by 1
    assert said.tolist() == [0.75, 0.625, 0]


def test_pairs_in_a_judges_own_words(server):
    def answer(request):
        first, second = request["brightness"]
        return says("Both images are equally good." if first == second else f"Image {1 + (second > first)} is better.")

    server.answer = answer
    question = 'Two images for [{prompt}]. Conclude with "Image 1 is better than Image 2." or the like.'
    assert score(loaded(server, pairs=True, question=question), flat(60, 100, 80)).tolist() == [0, 1, 0.5]
    assert not any("response_format" in request for request in server.asked)
