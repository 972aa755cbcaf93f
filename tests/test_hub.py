"""A run is pushed to a small server that speaks as much of the Hub's language as huggingface_hub asks it to."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from aegpo.hub import _named_shortly, _without_folders
from tests.report.test_report import CONFIG, make_run

TOKEN = "hf_notARealTokenButASecretOne"
REPO = "me/my-model"


class Hub(ThreadingHTTPServer):
    """Remembers requests and committed files; of paths in `broken` it answers 500, of those in `mute` nothing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.broken: tuple[str, ...] = ()
        self.mute: tuple[str, ...] = ()
        self.role, self.private = "write", True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.asked.append((path, lines[0] if lines else None))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        if path.endswith(self.server.mute):
            self.close_connection = True
            return None
        if path.endswith(self.server.broken):
            return self.send(500, {"error": "the Hub is on fire"})
        content = self.content(path, lines)
        self.send(404 if content is None else 200, content)

    def content(self, path: str, lines: list[Any]) -> Any:
        match path:
            case "/api/whoami-v2":
                return {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.server.role}}}
            case "/api/repos/create":
                return {"url": f"{self.server.address}/{REPO}", "name": REPO}
            case "/api/validate-yaml":
                return {"errors": [], "warnings": []}
            case "/api/models/me/my-model":
                return {"id": REPO, "_id": "1", "private": self.server.private, "tags": [], "siblings": []}
            case "/api/models/me/my-model/preupload/main":
                files = [file["path"] for file in lines[0]["files"]]
                return {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in files]}
            case "/api/models/me/my-model/commit/main":
                for file in (line["value"] for line in lines if line["key"] == "file"):
                    self.server.files[file["path"]] = base64.b64decode(file["content"])
                return {"commitUrl": f"{self.server.address}/{REPO}/commit/abc", "commitOid": "abc", "success": True}
        return None

    def send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def aegpo(hub: Hub, tmp_path: Path):
    """The command, of a user of that server; what it printed and its exit code, which never hold the token."""

    def command(*words: str, token: str = TOKEN, address: str = "") -> SimpleNamespace:
        own = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address or hub.address}
        own |= {"HF_TOKEN": token, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-m", "aegpo.cli", *words]
        done = subprocess.run(program, capture_output=True, text=True, env=os.environ | own, cwd=tmp_path)
        assert TOKEN not in done.stdout + done.stderr
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    return command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of an adapter, with all that a run may leave behind and something of its user's."""
    run = make_run(tmp_path / "my run")
    config = CONFIG | {"model": {"path": "/home/somebody/private/sd3", "train": "lora"}, "output_dir": "runs/mine"}
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"reward": "/home/somebody/reward.py:score"}))
    save_file({"transformer.a.lora_A.weight": torch.ones(2, 2)}, run / "pytorch_lora_weights.safetensors")
    for name in ("checkpoint-2/config.json", "checkpoint-2/weights.safetensors", "report.html", "eval/eval.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("/home/somebody")
    (run / "notes.md").write_text("to myself")
    return run


AS_THEY_ARE = ("pytorch_lora_weights.safetensors", "env.json", "metrics.jsonl")
AS_THEY_ARE += ("samples/step-000000.png", "samples/step-000006.png")


def test_a_push_brings_what_belongs_to_it_and_nothing_else(run: Path, hub: Hub, aegpo: Any):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = aegpo("push", str(run), REPO, "--private")
    assert (done.code, done.out, done.err) == (0, f"pushed: {hub.address}/{REPO}\n", "")
    assert set(hub.files) == {*AS_THEY_ARE, "README.md", "config.yaml"}
    for name in AS_THEY_ARE:
        assert hub.files[name] == (run / name).read_bytes()
    [created] = [said for path, said in hub.asked if path == "/api/repos/create"]
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "my-model", "private")

    card = hub.files["README.md"].decode()
    assert f'pipe.load_lora_weights("{REPO}")' in card
    assert "(samples/step-000000.png)" in card and "(samples/step-000006.png)" in card
    assert not any(b"somebody" in content for content in hub.files.values())
    own, pushed = (yaml.safe_load(text) for text in ((run / "config.yaml").read_text(), hub.files["config.yaml"]))
    assert pushed == own | {"model": {"path": "sd3", "train": "lora"}, "reward": "reward.py:score"}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_public_repository_is_not_taken_for_a_private_one(run: Path, hub: Hub, aegpo: Any):
    hub.private = False
    done = aegpo("push", str(run), REPO, "--private")
    assert (done.code, hub.files) == (2, {})
    assert done.err == "aegpo: me/my-model is public already; make it private on the Hub, or give another name\n"
    assert aegpo("push", str(run), REPO).code == 0
    assert "visibility" not in [said for path, said in hub.asked if path == "/api/repos/create"][-1]


@pytest.mark.parametrize("path", ["/repos/create", "/commit/main"])
@pytest.mark.parametrize(("how", "why"), [("broken", "the Hub is on fire"), ("mute", "disconnected")])
def test_a_hub_that_fails_costs_a_line(run: Path, hub: Hub, aegpo: Any, how: str, why: str, path: str):
    setattr(hub, how, (path,))
    done = aegpo("push", str(run), REPO)
    assert (done.code, done.out, hub.files) == (2, "", {})
    assert done.err.startswith(f"aegpo: run {run} is whole, but was not pushed: ") and done.err.count("\n") == 1
    assert why in done.err
    assert done.err.endswith(f"; to push it again: aegpo push '{run}' {REPO}\n")


def closed_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def test_what_is_wrong_is_said_before_anything_is_trained(hub: Hub, aegpo: Any, tmp_path: Path):
    def complaint(repo: str = REPO, **how: str) -> str:
        done = aegpo("train", "--output-dir", "runs/x", "--push-to-hub", repo, **how)
        assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return done.err.removeprefix("aegpo: ")

    assert complaint("my-model") == "'my-model' is not a repository on the Hub; give it as USER/NAME\n"
    assert complaint("me/my model").startswith("'me/my model' cannot be the name of a repository on the Hub: ")
    assert complaint(token="") == "there is no token for the Hub; log in with: hf auth login\n"
    assert not hub.asked
    assert complaint(token="hf_wrong").startswith("the Hub does not take the token: ")
    assert "hf_wrong" not in complaint(token="hf_wrong")
    refused = complaint(address=f"http://127.0.0.1:{closed_port()}")
    assert refused.startswith("the Hub cannot be reached: ") and "efused" in refused
    hub.role = "read"
    assert complaint().startswith("the token for the Hub may only read; ")
    assert not hub.files


def test_a_run_without_weights_is_not_pushed(run: Path, hub: Hub, aegpo: Any):
    (run / "pytorch_lora_weights.safetensors").unlink()
    done = aegpo("push", str(run), REPO)
    assert done.err == f"aegpo: run {run} has no weights yet: pytorch_lora_weights.safetensors is missing\n"
    assert "/api/repos/create" not in [path for path, _ in hub.asked]


TINY = ["--steps", "1", "--prompts-per-step", "2", "--rollouts-per-step", "16", "--eval-images", "1"]
TINY += ["--prompts.train", "few.txt", "--prompts.eval", "few.txt", "--output-dir", "x"]


def test_a_training_of_all_weights_ends_in_a_push(hub: Hub, aegpo: Any, tmp_path: Path):
    (tmp_path / "few.txt").write_text("a ring\na red cross\ntwo rings\n")
    hub.broken = ("/commit/main",)
    done = aegpo("train", *TINY, "--push-to-hub", REPO)
    assert done.code == 2 and "report: " in done.out
    said = done.err.splitlines()[-1]  # below what libraries remark when they are loaded
    assert said.startswith("aegpo: run x is whole, but was not pushed: ")
    assert said.endswith(f"; to push it again: aegpo push x {REPO}")
    hub.broken = ()
    assert aegpo("push", "x", REPO).code == 0

    run = tmp_path / "x"
    parts = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
    pipeline = {str(file.relative_to(run)) for part in parts for file in (run / part).rglob("*") if file.is_file()}
    rest = {"model_index.json", "README.md", "config.yaml", "env.json", "metrics.jsonl"}
    assert set(hub.files) == pipeline | rest | {"samples/step-000000.png", "samples/step-000001.png"}
    for name in pipeline | {"env.json", "metrics.jsonl"}:
        if not name.endswith("/config.json"):
            assert hub.files[name] == (run / name).read_bytes()
    assert not any(str(tmp_path).encode() in content or b"site-packages" in content for content in hub.files.values())
    for name in ("model_index.json", "transformer/config.json"):
        own, pushed = (json.loads(content) for content in ((run / name).read_bytes(), hub.files[name]))
        assert own.pop("_name_or_path").startswith("/") and not pushed.pop("_name_or_path").startswith("/")
        assert pushed == own


def test_folders_above_a_path_are_nobodys_business():
    settings = {
        "model": {"path": "/home/joe/secret/sd3"},
        "reward": "pickscore=/home/joe/secret/pick",
        "prompts": {"train": "../joe/secret/data", "eval": "owner/data:test"},
        "steps": 3,
    }
    assert _without_folders(settings) == {
        "model": {"path": "sd3"},
        "reward": "pickscore=pick",
        "prompts": {"train": "data", "eval": "owner/data:test"},
        "steps": 3,
    }


def test_rewards_go_by_their_last_part_in_settings_and_in_metrics():
    own, folder = "/home/joe/secret/mine.py:score", "pickscore=/home/joe/secret/pick"
    settings = {"reward": {own: 1, folder: {"weight": 0.5, "cache": "/home/joe/kept"}}}
    assert _without_folders(settings) == {
        "reward": {"mine.py:score": 1, "pickscore=pick": {"weight": 0.5, "cache": "kept"}}
    }
    trouble = {"reward": own, "kind": "failed", "images": 2, "what": f"reward {own} failed at /home/joe/x.py, line 3"}
    row = {f"reward/{own}/mean": 0.5, f"eval/reward_mean/{folder}": 1, "reward_troubles": [trouble]}
    assert json.loads(_named_shortly(json.dumps(row), settings)) == {
        "reward/mine.py:score/mean": 0.5,
        "eval/reward_mean/pickscore=pick": 1,
        "reward_troubles": [{"reward": "mine.py:score", "kind": "failed", "images": 2}],
    }
    away = {"reward": "remote=http://gpu1.corp:8123,http://gpu2.corp:8123", "token_file": "~/secret/x"}
    assert _without_folders(away) == {"reward": "remote", "token_file": "x"}
