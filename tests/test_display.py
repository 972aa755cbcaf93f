import io

from rich.console import Console

from aegpo import display
from aegpo.display import Display, bar

EVALUATED = {"step": 0, "forwards": 1200, "seconds": 1.4, "eval/reward_mean": 0.5, "eval/pass_rate": 0.25}
TRAINED = {"step": 1, "forwards": 2400, "seconds": 2.6, "reward/mean": 0.75}


def lines(quiet, monkeypatch):
    """What is printed where there is no terminal."""
    monkeypatch.setattr(display, "QUIET", quiet)
    file = io.StringIO()
    with Display(2, Console(file=file, width=200)) as shown:
        shown.step(EVALUATED)
        shown.begin("rollouts", 8)
        shown.advance(8)
        shown.step(TRAINED)
        shown.step(TRAINED | EVALUATED | {"step": 2})
    return file.getvalue().splitlines()


def test_without_a_terminal_there_is_a_line_an_evaluation_and_one_when_it_was_quiet_for_long(monkeypatch):
    first = "step    0: held-out reward 0.500, pass rate 25.0%  (1,200 forwards, 1 s)"
    assert lines(1000, monkeypatch) == [first, first.replace("0:", "2:", 1)]
    between = ["rollouts: 8 of 8", "step    1: reward 0.750  (2,400 forwards, 3 s)"]
    assert lines(-1, monkeypatch) == [first, *between, first.replace("0:", "2:", 1)]


def test_a_reward_that_cannot_be_right_is_said_at_once_and_a_step_without_any_has_no_mean(monkeypatch):
    monkeypatch.setattr(display, "QUIET", -1)
    file = io.StringIO()
    trouble = {"reward": "own", "kind": "not_finite", "images": 3, "what": "reward own said nan of an image for [b]"}
    with Display(2, Console(file=file, width=200)) as shown:
        for _ in range(2):
            shown.step(TRAINED | {"reward/mean": None, "reward_troubles": [trouble]})
    assert file.getvalue().splitlines() == [
        "step    1: not_finite (3 images): reward own said nan of an image for [b]",
        *["step    1: (2,400 forwards, 3 s)"] * 2,
    ]


def test_a_piece_of_work_without_a_terminal_is_a_line_only_when_it_was_quiet_for_long(monkeypatch):
    for quiet, said in [(1000, []), (-1, ["analysis: 1,000 of 1,500", "analysis: 1,500 of 1,500"])]:
        monkeypatch.setattr(display, "QUIET", quiet)
        file = io.StringIO()
        with bar("analysis", 1500, Console(file=file, width=200)) as advance:
            advance(1000)
            advance(500)
        assert file.getvalue().splitlines() == said
