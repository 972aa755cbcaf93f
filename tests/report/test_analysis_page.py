"""The page of an analysis shows the numbers of its JSON, and nothing but them."""

import copy
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from aegpo.config import resolve
from aegpo.report import write_analysis

HOSTILE = '<script>alert("x")</script> & {{ 7 * 7 }}'
CONFIG = resolve(
    {
        "sampler": {"steps": 5, "kind": "ode"},
        "exploration": {"rule": "random"},
        "reward": "mine.py:<b>score</b>",
        "seed": 3,
    }
)
MANY = 40  # prompts
MINUS = "\N{MINUS SIGN}"


def checkpoint(step: int, last: bool = False) -> dict[str, Any]:
    gain = None if last else [(i - step - 15) / 64 for i in range(MANY)]
    return {
        "step": step,
        "delta_entropy": [step * (i * 7 % MANY) / 1000 for i in range(MANY)],
        "reward": [i / MANY for i in range(MANY)],
        "reward_std": [0.1] * MANY,
        "gain_to_next": gain,
        "gain_to_last": gain,
    }


def related(step: int, gain: str, values: list[float | None]) -> dict[str, Any]:
    row = {"step": step, "next": step + 10, "gain": gain, "n": MANY, "standard_error": 0.16}
    return row | dict(zip(("delta_entropy", "reward", "reward_std"), values, strict=True))


def reading(values: list[float], correlation: float | None, chosen: list[int], share: float | None) -> dict[str, Any]:
    return {"curve": values, "correlation": correlation, "chosen": chosen, "share": share}


@pytest.fixture
def measured() -> dict[str, Any]:
    order = sorted(range(MANY), key=lambda i: -(i * 7 % MANY))
    return {
        "images": 2,
        "prompts": [HOSTILE if i == order[0] else f"prompt {i}" for i in range(MANY)],
        "entropy": {"base": [[3.0] * 5, [2.0] * 5], "policy": [[3.25] * 5, [1.5] * 5], "step": 20},
        "checkpoints": [checkpoint(0), checkpoint(10), checkpoint(20, last=True)],
        "correlations": [
            related(0, "gain_to_next", [None, -0.5, 0.125]),
            related(0, "gain_to_last", [None, -0.25, 0.0625]),
            related(10, "gain_to_next", [0.34, -0.31, 0.0]),
            related(10, "gain_to_last", [0.42, -0.75, None]),
        ],
        "ranking": {"step": 10, "order": order},
        "spread_over": {"step": 20, "prompts": [0, 1, 2], "rollouts": 6, "sampler": {"kind": "cps", "eta": 0.6}},
        "spread": [0.3, 0.2, 0.1, 0.05, 0.0],
        "best": [0, 1, 2, 3],
        "random_share": 0.75,
        "readings": {
            "entropy": reading([3.0, 3.1, 3.2, 3.3, 3.4], -1.0, [1, 2, 3], 0.538),
            "delta_entropy": reading([0.2, 0.1, 0.1, 0.1, 0.0], 0.775, [0, 1], None),
            "policy_noise": reading([0.5] * 5, None, [0, 1, 2, 3], 1.0),
        },
    }


def pages(folder: Path, measured: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    page = write_analysis(folder, CONFIG, "my <i>run</i>", measured)
    return page.read_text("utf-8"), json.loads((folder / "analysis.json").read_text("utf-8"))


def tables(html: str) -> list[list[list[str]]]:
    """The cells of each table, as text."""

    def text(cell: str) -> str:
        return unescape(re.sub(r"<[^>]*>", "", cell)).strip().replace(MINUS, "-")

    rows = [
        re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in re.findall(r"<table.*?</table>", html, re.DOTALL)
    ]
    return [[[text(c) for c in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in table] for table in rows]


def test_the_tables_show_the_numbers_of_the_json(tmp_path: Path, measured: dict[str, Any]) -> None:
    html, numbers = pages(tmp_path, measured)
    assert numbers == numbers | measured
    to_next, to_last, ranking, readings = tables(html)
    assert to_next[1:] == [["0", "–", "-0.50", "+0.12"], ["10", "+0.34", "-0.31", "+0.00"]]
    assert to_last[1:] == [["0", "–", "-0.25", "+0.06"], ["10", "+0.42", "-0.75", "–"]]
    assert readings[1:] == [
        ["H(t)", "-1.00", "2, 3, 4", "53.8 %"],
        ["|ΔH(t)|", "+0.78", "1, 2", "–"],
        ["Policy noise", "–", "1, 2, 3, 4", "100.0 %"],
        ["Drawn at random", "", "", "75.0 %"],
    ]
    assert len(ranking) == 1 + 8 + 1 + 8
    assert ranking[9] == ["… 24 between …"]
    at = numbers["checkpoints"][1]
    shown = [*numbers["ranking"]["order"][:8], *numbers["ranking"]["order"][-8:]]
    for i, (prompt, moved, reward, gain) in zip(shown, ranking[1:9] + ranking[10:], strict=True):
        assert prompt == numbers["prompts"][i]
        assert float(moved) == pytest.approx(at["delta_entropy"][i], abs=5.1e-5)
        assert float(reward) == pytest.approx(at["reward"][i], abs=5.1e-4)
        assert float(gain) == pytest.approx(at["gain_to_next"][i], abs=5.1e-4)


def test_what_is_within_two_standard_errors_is_grey(tmp_path: Path, measured: dict[str, Any]) -> None:
    html, _ = pages(tmp_path, measured)
    strong = re.findall(r"<strong>(.*?)</strong>", html)
    assert strong == [f"{MINUS}0.50", "+0.34", "+0.42", f"{MINUS}0.75"]


def test_it_says_which_sampler_stood_in_for_one_without_noise(tmp_path: Path, measured: dict[str, Any]) -> None:
    html, numbers = pages(tmp_path, measured)
    assert "cps with eta 0.6 stands in for it" in html
    assert (numbers["sampler"], numbers["spread_over"]["sampler"]["kind"]) == ("ode", "cps")
    own = copy.deepcopy(measured)
    own["spread_over"]["sampler"]["kind"] = "ode"
    assert "stands in" not in pages(tmp_path, own)[0]


def test_nothing_is_loaded_and_words_are_words(tmp_path: Path, measured: dict[str, Any]) -> None:
    html, _ = pages(tmp_path, measured)
    assert re.findall(r'https?://[^"\s<]*', html.replace("http://www.w3.org/", "")) == [
        "https://arxiv.org/abs/2602.06825"
    ]
    assert not re.search(r"<(script|link|iframe|object|embed|base|img|b|i>)[ >]", html.replace("<i class", ""))
    assert not re.search(r"(src|srcset|poster)=|@import|url\((?!#)", html)
    assert html.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; {{ 7 * 7 }}") == 1
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) <= set(ids)


def test_a_policy_that_was_not_trained(tmp_path: Path, measured: dict[str, Any]) -> None:
    measured |= {"correlations": [], "ranking": None, "checkpoints": [checkpoint(0, last=True)]}
    measured["entropy"] |= {"policy": None, "step": 0}
    measured["spread_over"]["step"] = 0
    html, _ = pages(tmp_path, measured)
    assert [table[0][0] for table in tables(html)] == ["Curve"]
    assert "Its mean reward is 0.487." in html
    assert html.count("by attention layer and denoising step") == 1


def test_a_run_without_a_checkpoint_between_is_told_how_to_keep_one(tmp_path: Path, measured: dict[str, Any]) -> None:
    measured["ranking"] = None
    html, _ = pages(tmp_path, measured)
    assert [table[0][0] for table in tables(html)] == ["At step", "At step", "Curve"]
    assert "checkpoints_total_limit" in html


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path, measured: dict[str, Any]) -> None:
    assert pages(tmp_path, measured) == pages(tmp_path, copy.deepcopy(measured))
