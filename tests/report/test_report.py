import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from aegpo.config import dump_yaml, resolve
from aegpo.report import model_card, save_grid, write_model_card, write_report
from aegpo.report.html import duration
from aegpo.report.plots import chunked, moving_average
from aegpo.report.records import read_run

HOSTILE = '<script>alert("x")</script> & " onerror="alert(1) {{ 7 * 7 }} $\\alpha$ 赤'
PROMPTS = ["a red circle", "two blue squares", HOSTILE]
CONFIG = {
    "model": {"path": "world", "train": "lora"},
    "algorithm": "aegpo",
    "sampler": {"steps": 4, "kind": "flow_sde", "guidance": 1.0},
    "allocation": {"rule": "uniform"},
    "exploration": {"rule": "window"},
    "steps": 6,
    "seed": 3,
}
EVALUATIONS = {
    0: {
        "eval/reward_mean": 0.31249,
        "eval/pass_rate": 0.4375,
        "eval/reward/counting": 0.25,
        "eval/pass_rate/counting": 0.5,
        "eval/reward/<i>position</i>": 0.6,
        "eval/pass_rate/<i>position</i>": 0.375,
    },
    3: {"eval/reward_mean": 0.5, "eval/pass_rate": 0.5},
    6: {
        "eval/reward_mean": 0.45151,
        "eval/pass_rate": 0.625,
        "eval/reward/counting": 0.75,
        "eval/pass_rate/counting": 1.0,
        "eval/reward/<i>position</i>": 0.4,
        "eval/pass_rate/<i>position</i>": 0.25,
    },
}


def training_row(step: int) -> dict:
    return {
        "step": step,
        "seconds": 2.0 + 10 * step,
        "forwards": 100 + 1000 * step,
        "rollouts": 24,
        "reward/mean": 0.3 + 0.01 * step,
        "reward/std": 0.2,
        "allocation": [4, 12, 8],
        "prompts": [PROMPTS[step % 3], PROMPTS[(step + 1) % 3], f"prompt {step}"],
        "explored_steps": [24, 12, 0, 6],
        "entropy": [3.5, 3.3, 3.4, 3.6],
        "entropy/mean": 3.45,
        "delta_entropy/mean": 0.01,
        "zero_advantage_groups": 1,
        "ratio/mean": 1.0,
        "clip_fraction": 0.1,
        "approx_kl": 1e-6,
        "grad_norm": 0.01,
        "lr": 3e-4,
    }


def metrics() -> list[dict]:
    rows = [{"step": 0, "seconds": 2.0, "forwards": 100}, *map(training_row, range(1, 7))]
    return [row | EVALUATIONS.get(row["step"], {}) for row in rows]


def write_metrics(run: Path, rows: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def pictures(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, side, side, 3)).astype(np.uint8)


def make_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), "utf-8")
    (folder / "env.json").write_text(json.dumps({"python": "3.11.7", "versions": {"torch": "2.13.0"}}), "utf-8")
    write_metrics(folder, metrics())
    save_grid(folder / "samples/step-000000.png", pictures(0), PROMPTS, [0.25, 0.5, 0.0], [False, True, None])
    save_grid(folder / "samples/step-000003.png", pictures(1), PROMPTS, [0.1, 0.1, 0.1])
    save_grid(folder / "samples/step-000006.png", pictures(2), PROMPTS, [0.75, 0.5, 1.0], [True, True, True])
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, to do with as one likes."""
    return make_run(tmp_path / "my-run")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a finished run."""
    return write_report(make_run(tmp_path_factory.mktemp("report") / "my-run")).read_text("utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> "Page":
    """The same, parsed."""
    return Page(html)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text, and its tables as rows of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()

    def attributes(self, *names: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements for name in names if name in attrs]

    def sections(self) -> set[str]:
        return {attrs["id"] for tag, attrs in self.elements if tag == "section"}


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text("utf-8"))


def number(cell: str) -> float:
    value = float(cell.replace("\N{MINUS SIGN}", "-").removesuffix(" %"))
    return value / 100 if cell.endswith(" %") else value


def test_headline_table_says_what_the_first_and_the_last_evaluation_measured(page: Page) -> None:
    rewards, passes = page.tables[:2]
    names = {"All prompts": "", "counting": "/counting", "<i>position</i>": "/<i>position</i>"}
    for table, stem, whole, points in [(rewards, "reward", "_mean", 1), (passes, "pass_rate", "", 100)]:
        assert [row[0] for row in table[1:]] == list(names)
        for name, before, after, change in table[1:]:
            key = f"eval/{stem}{names[name] or whole}"
            first, last = EVALUATIONS[0][key], EVALUATIONS[6][key]
            assert number(before) == pytest.approx(first, abs=5.1e-4)
            assert number(after) == pytest.approx(last, abs=5.1e-4)
            assert number(change) == pytest.approx(points * (last - first), abs=5.1e-4 if points == 1 else 0.051)


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links == ["https://arxiv.org/abs/2602.06825", "https://arxiv.org/abs/2505.05470"]
    loaded = page.attributes("src", "xlink:href", "srcset", "data", "poster")
    assert len(loaded) > 6
    assert all(address.startswith(("data:image/", "#")) for address in loaded)
    css = page.text + " ".join(page.attributes("style", "clip-path"))
    assert "@import" not in css
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", css))


def test_prompts_and_tasks_are_text_and_nothing_else(page: Page) -> None:
    assert HOSTILE in page.text
    assert not {tag for tag, _ in page.elements} & {"script", "b"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    alternatives = [attrs["alt"] for tag, attrs in page.elements if tag == "img"]
    assert f"{HOSTILE}, before" in alternatives
    assert f"{HOSTILE}, after" in alternatives


def test_figures_hold_no_words_of_the_user(html: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) > 10
    assert not [figure for figure in figures if "alert" in figure or "position" in figure]


def test_ids_are_unique_and_every_reference_finds_one(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    references = [address[1:] for address in page.attributes("xlink:href") if address.startswith("#")]
    references += [address[5:-1] for address in page.attributes("clip-path")]
    assert references
    assert set(references) <= set(ids)


def test_held_out_curve_is_drawn_through_the_evaluations(html: str) -> None:
    figure = re.search(r'aria-label="Reward over training".*?</svg>', html, re.DOTALL)
    assert figure
    line = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--accent\)', figure[0])
    assert line
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line[1]), dtype=float)
    expected = np.array([[step, row["eval/reward_mean"]] for step, row in EVALUATIONS.items()])
    assert np.allclose(shape_of(points * [1, -1]), shape_of(expected), atol=1e-4)  # SVG counts downwards


def shape_of(points: np.ndarray) -> np.ndarray:
    """The points on axes that run from 0 to 1."""
    return (points - points.min(axis=0)) / np.ptp(points, axis=0)


def test_explored_steps_are_stacked_to_their_totals(html: str) -> None:
    figure = re.search(r'aria-label="Rollouts that explored each.*?</svg>', html, re.DOTALL)
    assert figure
    bars = re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--phase-(\d)\)', figure[0])
    tops, bottoms = np.zeros((2, 4, 4))  # part of training, denoising step
    for index, (path, phase) in enumerate(bars):
        corners = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
        tops[int(phase) - 1, index % 4], bottoms[int(phase) - 1, index % 4] = min(corners), max(corners)
    assert np.allclose(bottoms[1:], tops[:-1], atol=1e-4)  # each part stands on the one before
    heights = bottoms - tops
    parts = np.array([1, 2, 1, 2])  # six training steps in four parts
    expected = np.outer(parts, [24, 12, 0, 6])
    assert np.allclose(heights / heights.sum(), expected / expected.sum(), atol=1e-5)


def test_prompts_that_got_most(page: Page) -> None:
    table = page.tables[2]
    given: dict[str, list[int]] = {}
    for row in metrics()[1:]:
        for prompt, rollouts in zip(row["prompts"], row["allocation"], strict=True):
            given.setdefault(prompt, []).append(rollouts)
    totals = {prompt: sum(rollouts) for prompt, rollouts in given.items()}
    assert len(table) == 1 + 8
    assert [int(row[3]) for row in table[1:]] == sorted(totals.values(), reverse=True)[:8]
    for prompt, draws, each, total in table[1:]:
        assert (int(draws), int(total)) == (len(given[prompt]), totals[prompt])
        assert float(each) == pytest.approx(totals[prompt] / len(given[prompt]), abs=0.05)


def test_pictures_stand_side_by_side_with_their_scores(page: Page) -> None:
    shown = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    for index, source in enumerate(shown):
        original = pictures([0, 2][index % 2])[index // 2]
        assert np.array_equal(decoded(source), enlarged(original, 4))
    scores = re.findall(r"(Before|After) (\d\.\d\d)\s*([✓✗]?)", page.text)
    assert scores == [
        ("Before", "0.25", "✗"),
        ("After", "0.75", "✓"),
        ("Before", "0.50", "✓"),
        ("After", "0.50", "✓"),
        ("Before", "0.00", ""),
        ("After", "1.00", "✓"),
    ]


def decoded(address: str) -> np.ndarray:
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"), validate=True)
    return np.asarray(Image.open(io.BytesIO(data)))


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def test_the_same_folder_gives_the_same_bytes_wherever_it_stands(run: Path, tmp_path: Path) -> None:
    first, card = write_report(run).read_bytes(), write_model_card(run).read_bytes()
    copy = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    assert write_report(run).read_bytes() == first
    assert write_report(copy).read_bytes() == first
    assert write_model_card(copy).read_bytes() == card


def test_a_last_line_cut_short_is_as_if_it_were_not_there(run: Path) -> None:
    *rows, row = metrics()[:6]
    last = json.dumps(row, ensure_ascii=False).encode()
    inside_a_character = last.index("赤".encode()) + 1
    for cut in (1, inside_a_character, len(last) - 1):
        write_metrics(run, rows)
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(last[:cut])
        assert read_run(run).rows == rows
    assert "Stopped after step 4 of 6." in page_of(run).text


@pytest.mark.parametrize(
    ("damaged", "said"), [('{"step": 1,', "not JSON"), ("[1]", "not the metrics of a step"), ('{"loss": 1}', "not the")]
)
def test_a_damaged_line_elsewhere_is_named(run: Path, damaged: str, said: str) -> None:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], f"{damaged}\n", *lines[2:]]), "utf-8")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: {said}"):
        write_report(run)


def test_a_run_without_evaluation_probe_or_verifier(run: Path) -> None:
    dropped = ("eval/", "entropy", "delta_entropy")
    rows = [{key: value for key, value in row.items() if not key.startswith(dropped)} for row in metrics()[1:]]
    write_metrics(run, rows)
    shutil.rmtree(run / "samples")
    page = page_of(run)
    assert page.sections() == {"headline", "learning", "budget", "training", "settings"}
    assert "This run made no evaluation." in page.text
    assert "Results" not in write_model_card(run).read_text("utf-8")


def test_a_run_stopped_before_its_first_step(run: Path) -> None:
    write_metrics(run, [{"step": 0, "seconds": 0.0, "forwards": 0}])
    (run / "env.json").unlink()
    shutil.rmtree(run / "samples")
    page = page_of(run)
    assert page.sections() == {"headline", "settings"}
    assert "Stopped after step 0 of 6." in page.text
    assert ModelCard.load(write_model_card(run)).data.library_name == "diffusers"


@pytest.mark.parametrize("content", [None, "", '{"step":'])
def test_a_run_without_metrics_keeps_the_report_it_has(run: Path, content: str | None) -> None:
    before = write_report(run).read_bytes()
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match="has no metrics yet"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_a_run_stopped_after_its_first_evaluation(run: Path) -> None:
    write_metrics(run, metrics()[:3])
    for name in ("step-000003", "step-000006"):
        (run / f"samples/{name}.json").unlink()
    page = page_of(run)
    assert "Stopped after step 2 of 6." in page.text
    assert page.tables[0][1] == ["All prompts", "0.312", "–", "–"]
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 3


def test_prompts_without_tasks_or_verdicts(run: Path) -> None:
    rows = [{k: v for k, v in row.items() if "/pass_rate" not in k and "eval/reward/" not in k} for row in metrics()]
    write_metrics(run, rows)
    tables = page_of(run).tables
    assert tables[0][1:] == [["All prompts", "0.312", "0.452", "+0.139"]]
    assert tables[1][0][0] == "Prompt"


@pytest.mark.parametrize("name", ["metrics.jsonl", "env.json", "samples"])
def test_links_out_of_the_folder_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    shutil.move(run / name, outside)
    (run / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} leads outside the run's folder"):
        write_report(run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run's folder"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not a run's folder"):
        write_model_card(tmp_path / "absent")


def test_grid_holds_each_small_picture_enlarged_pixel_for_pixel(tmp_path: Path) -> None:
    images = np.random.default_rng(5).integers(0, 256, (5, 24, 32, 3)).astype(np.uint8)
    save_grid(tmp_path / "grid.png", images, [f"prompt {n}" for n in range(5)], np.linspace(0, 1, 5).tolist())
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    record = json.loads((tmp_path / "grid.json").read_text("utf-8"))
    assert record["prompts"] == [f"prompt {n}" for n in range(5)]
    assert record["scores"] == [0, 0.25, 0.5, 0.75, 1]
    assert record["passed"] == [None] * 5
    for image, (left, top, right, bottom) in zip(images, record["boxes"], strict=True):
        assert np.array_equal(grid[top:bottom, left:right], enlarged(image, 4))
    assert len({tuple(box[:2]) for box in record["boxes"]}) == 5


def test_grid_shrinks_large_pictures(tmp_path: Path) -> None:
    colours = np.array([[200, 30, 40], [10, 220, 90]], dtype=np.uint8)
    save_grid(tmp_path / "grid.png", np.tile(colours[:, None, None], (1, 512, 1024, 1)), ["a", "b"], [0.0, 1.0])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for colour, (left, top, right, bottom) in zip(
        colours, json.loads((tmp_path / "grid.json").read_text())["boxes"], strict=True
    ):
        assert (right - left, bottom - top) == (256, 128)
        assert (grid[top:bottom, left:right] == colour).all()


def test_grid_captions_stay_below_their_pictures(tmp_path: Path) -> None:
    images = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    long_prompts = ["word " * 60, "unbroken" * 60, "", "line\nbreak\ttab"]
    save_grid(tmp_path / "grid.png", images, long_prompts, [0.5] * 4, [True, False, None, True])
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    green, red = (np.abs(grid - colour).sum(axis=-1) < 60 for colour in ((0x1A, 0x7F, 0x4B), (0xC2, 0x41, 0x3A)))
    boxes = json.loads((tmp_path / "grid.json").read_text("utf-8"))["boxes"]
    captions = [np.s_[bottom + 1 : bottom + 76, left:right] for left, _, right, bottom in boxes]
    assert [bool(green[caption].any()) for caption in captions] == [True, False, False, True]
    assert [bool(red[caption].any()) for caption in captions] == [False, True, False, False]
    written = np.zeros(grid.shape[:2], dtype=bool)
    for (left, top, right, bottom), caption in zip(boxes, captions, strict=True):
        written[top - 1 : bottom + 1, left - 1 : right + 1] = True
        written[caption] = True
    assert (grid[~written] == 255).all()


def test_model_card_says_what_was_measured_and_how_to_load_it(run: Path) -> None:
    card = ModelCard.load(write_model_card(run))
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "diffusers", "aegpo", "reinforcement-learning"],
    }
    assert "| All prompts | 0.312 | 0.452 | +0.139 |" in card.text
    assert "| counting | 50.0 % | 100.0 % | +50.0 |" in card.text
    assert "<i>" not in card.text
    assert "6 steps, 6,100 forwards, 1 min 02 s" in card.text
    assert "- python 3.11.7\n- torch 2.13.0\n" in card.text
    assert "2602.06825" in card.text and "2505.05470" in card.text and "2509.25050" not in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code and 'pipe.load_lora_weights(".")' in code[1]
    assert "Apache-2.0" in card.text and "comfyui" not in card.text  # which cannot load the embedded model
    links = re.findall(r"!\[.*\]\((.*)\)", card.text)
    assert links == ["samples/step-000000.png", "samples/step-000006.png"]
    assert all((run / link).is_file() for link in links)


@pytest.mark.parametrize(("train", "loads"), [("lora", "load_lora_weights"), ("full", "from_pretrained")])
def test_a_card_for_the_hub_loads_from_there(run: Path, train: str, loads: str) -> None:
    (run / "config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"model": {"path": "owner/base", "train": train}}), "utf-8"
    )
    here, there = model_card(run), model_card(run, "me/my-model")
    assert f'{loads}("."' in here and f'{loads}("me/my-model"' in there
    assert "# my-run\n" in here and "# my-model\n" in there
    assert "# the folder of this card" in here and "# the folder of this card" not in there


def test_a_run_of_matching_says_so_and_names_its_paper(run: Path) -> None:
    exploring = "Training rewards come from rollouts of the training prompts, which explore"
    assert exploring in write_report(run).read_text("utf-8")
    matching = CONFIG | {"sampler": {"steps": 4, "kind": "ode", "guidance": 1.0}, "loss": {"kind": "clip"}}
    (run / "config.yaml").write_text(yaml.safe_dump(matching), "utf-8")
    report, card = write_report(run).read_text("utf-8"), write_model_card(run).read_text("utf-8")
    assert exploring not in report
    assert "https://arxiv.org/abs/2509.25050" in report
    assert "(`aegpo`, transitions `ode`, allocation `uniform`, explored steps `window`)" in card
    assert "eprint        = {2509.25050}" in card and card.endswith("}\n```\n")
    assert "2505.05470" not in card


@pytest.mark.parametrize(
    ("algorithm", "papers"),
    [
        ("flow-grpo", ["2602.06825", "2505.05470"]),
        ("flow-grpo-fast", ["2602.06825", "2505.05470", "2509.05952"]),
        ("branch-grpo", ["2602.06825", "2509.06040", "2505.07818"]),
        ("mix-grpo-flash", ["2602.06825", "2507.21802", "2505.05470", "2211.01095"]),
        ("dgpo", ["2602.06825", "2510.08425"]),
        ("awm", ["2602.06825", "2509.25050"]),
        ("ddpo", ["2602.06825", "2305.13301"]),
    ],
)
def test_a_card_cites_what_the_run_stands_on_and_nothing_else(run: Path, algorithm: str, papers: list[str]) -> None:
    choices = yaml.safe_load(dump_yaml(resolve({"algorithm": algorithm})))
    (run / "config.yaml").write_text(yaml.safe_dump(choices), "utf-8")
    cited = re.findall(r"eprint        = \{([0-9.]+)\}", write_model_card(run).read_text("utf-8"))
    assert cited == papers
    report = write_report(run).read_text("utf-8")
    assert all(f"https://arxiv.org/abs/{paper}" in report for paper in papers)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_card_loads_what_the_run_loaded(run: Path, train: str) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": {"path": "mine", "train": train}}), "utf-8")
    env = json.loads((run / "env.json").read_text("utf-8"))
    pipeline = {"dtype": "float32", "absent": ["text_encoder_3", "tokenizer_3"]}
    pipeline |= {"scheduler": "DDIMScheduler.from_config(pipe.scheduler.config)"} if train == "lora" else {}
    pipeline |= {"call": {"guidance_scale": 4.5, "negative_prompt": "", "max_sequence_length": 0}}
    (run / "env.json").write_text(json.dumps(env | {"pipeline": pipeline}), "utf-8")
    card = write_model_card(run).read_text("utf-8")
    assert ", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)" in card
    assert "guidance_scale=4.5, negative_prompt='', max_sequence_length=0).images[0]" in card
    imported = "from diffusers import DDIMScheduler, DiffusionPipeline\n"
    own = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)\npipe.load_lora_weights"
    assert (imported in card) == (own in card) == (train == "lora")
    assert "text-to-image" in card and "text-to-video" not in card


def test_a_card_of_a_video_model(run: Path) -> None:
    env = json.loads((run / "env.json").read_text("utf-8"))
    (run / "env.json").write_text(json.dumps(env | {"pipeline": {"call": {"num_frames": 5}}}), "utf-8")
    card = ModelCard.load(write_model_card(run))
    assert card.data.to_dict()["pipeline_tag"] == "text-to-video"
    assert "num_frames=5).frames[0]" in card.text


@pytest.mark.parametrize(
    ("path", "train", "base_model", "loads"),
    [
        ("owner/model-3.5", "lora", "owner/model-3.5", "from_pretrained('owner/model-3.5', dtype=torch.bfloat16)"),
        ("/home/somebody/private/sd3", "lora", None, "from_pretrained('sd3', dtype=torch.bfloat16)"),
        ("owner/model-3.5", "full", "owner/model-3.5", 'from_pretrained(".", dtype=torch.bfloat16)'),
    ],
)
def test_model_card_of_other_models(run: Path, path: str, train: str, base_model: str | None, loads: str) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": {"path": path, "train": train}}), "utf-8")
    card = ModelCard.load(write_model_card(run))
    assert card.data.to_dict().get("base_model") == base_model
    relation = {"lora": "adapter", "full": "finetune"}[train] if base_model else None
    assert card.data.to_dict().get("base_model_relation") == relation
    [licence] = re.findall(r"## Licence\n\n(.*)\n", card.text)
    link = "[owner/model-3.5](https://huggingface.co/owner/model-3.5)" if base_model else "the local pipeline sd3"
    assert licence == f"A derivative of {link}: the licence of that model holds for this one."
    assert ("aegpo export FOLDER --comfyui" in card.text) == (train == "lora")
    assert ("lora" in card.data.to_dict()["tags"]) == (train == "lora")
    assert "license" not in card.data.to_dict()
    assert loads in card.text
    assert "somebody" not in card.content


def test_moving_average_is_the_mean_of_a_window() -> None:
    values = np.random.default_rng(0).normal(size=100)
    window = np.convolve(values, np.ones(13) / 13, mode="valid")  # 6 on either side
    assert np.allclose(moving_average(values.tolist())[6:-6], window)
    assert moving_average(values.tolist())[0] == pytest.approx(values[:7].mean())
    assert moving_average([]) == []


def test_chunks_are_even_and_miss_nothing() -> None:
    for length in range(1, 30):
        parts = chunked(range(length), 4)
        assert [n for part in parts for n in part] == list(range(length))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(parts) == min(4, length)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (312, "5 min 12 s"), (7440, "2 h 04 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_importing_the_report_loads_nothing_heavy() -> None:
    heavy = {"torch", "matplotlib", "jinja2", "numpy", "diffusers"}
    code = f"import sys, aegpo.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
