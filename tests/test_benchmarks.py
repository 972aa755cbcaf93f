"""The statistics that the benchmarks' figures rest on."""

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def in_the_benchmarks_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_signal_to_noise_of_gradients_that_are_a_mean_and_known_noise():
    """g = m + e with |m|^2 = 9 and tr Cov(e) = 400 x .25 = 100: .09; and the error is how far such findings spread."""
    signal_to_noise = importlib.import_module("signal_to_noise").signal_to_noise
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        gradients = rng.normal(0, 0.5, (32, 400))
        gradients[:, 0] += 3
        found.append(signal_to_noise(gradients @ gradients.T))
    ratios, errors = np.array(found).T
    assert ratios.mean() == pytest.approx(0.09, abs=3 * ratios.std() / 200**0.5)
    assert ratios.std() / 200**0.5 < 0.002
    assert errors.mean() == pytest.approx(ratios.std(), rel=0.2)
    exact = np.array([[3.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 4.0]])  # |m|^2 = 1, E |g|^2 = 4
    assert signal_to_noise(exact)[0] == pytest.approx(1 / 3)


def test_what_a_run_spends_to_a_target_and_the_median_over_runs_that_may_never_come():
    convergence = importlib.import_module("convergence")
    curve = [{"reward": r, "forwards": f} for r, f in ((0.9, 0), (0.5, 10), (0.7, 20), (0.6, 30), (0.8, 40))]
    assert convergence.to_target({"curve": curve}, 0.7, "forwards") == 20  # the first point is the base's
    assert convergence.to_target({"curve": curve}, 0.75, "forwards") == 40
    assert convergence.to_target({"curve": curve}, 0.85, "forwards") is None
    middle, low, high = convergence.median_of_seeds([30, None, 10, 20, 40])
    assert (middle, low, high) == (30, 10, np.inf)  # three of five are the one that never came in 5.8 % of samples
    assert convergence.median_of_seeds([7, 7, 7]) == (7, 7, 7)
    assert convergence.median_of_seeds([30, 10, None, 20])[0] == 25
    assert convergence.written([30, None, 10, 20, 40]) == "30 (10..never)"
    assert convergence.written([None, None]) == "never"


def test_the_target_is_the_highest_mean_of_flow_grpo_under_either_average():
    convergence = importlib.import_module("convergence")

    def run(method, seed, *rewards):
        return {"part": "hosts", "method": method, "seed": seed, "curve": [{"reward": r} for r in rewards]}

    long = [run("flow-grpo", 1, 0.5, 0.9, 0.6), run("flow-grpo", 2, 0.5, 0.5, 0.7)]  # means .5, .7, .65
    short = [run(convergence.AVERAGED, 1, 0.5, 0.74), run(convergence.AVERAGED, 2, 0.5, 0.7)]  # means .5, .72
    swept, other = run("flow-grpo", convergence.SWEEP, 0.5, 1.0, 1.0), run("aegpo", 1, 0.5, 1.0)
    assert convergence.target([*long, swept, other]) == pytest.approx(0.7)
    assert convergence.target([*long, *short, swept, other]) == pytest.approx(0.72)
