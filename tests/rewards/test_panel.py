"""Several rewards at once, and what becomes of one that cannot be right."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from aegpo.adapt.courses import lay_out
from aegpo.config import Checks, resolve
from aegpo.math.advantages import gdpo, group_advantages
from aegpo.rewards import Reward, load, on_frames
from aegpo.rewards import panel as panels
from aegpo.rewards.own import pairwise
from aegpo.rewards.panel import CONSTANT, Inquiry, Panel, alone
from aegpo.train import credit
from aegpo.types import Judgement, Plan, Prompt, Verdict

NAN, INF = float("nan"), float("inf")


def images(*values):
    """One picture of 2 x 2 a value, which its red says."""
    pictures = np.zeros((len(values), 2, 2, 3), np.uint8)
    pictures[..., 0] = np.array(values)[:, None, None]
    return pictures


def prompts(*ids):
    return [Prompt(one, f"prompt {one}", {"half": one / 2}) for one in ids]


def red(pictures, prompts, metadata):
    return Judgement(pictures[:, 0, 0, 0].astype(np.float32))


def says(table):
    """A reward that says for a red of 1 the first of these, and so on."""
    return Reward("told", lambda pictures, *_: Judgement(np.array(table, np.float32)[pictures[:, 0, 0, 0]]))


def test_rewards_are_summed_by_their_weights_and_each_is_kept():
    halves = Reward(
        "halves", lambda pictures, texts, about: Judgement(np.array([row["half"] for row in about], np.float32))
    )
    seen = Reward("seen", lambda pictures, texts, about: Judgement(np.full(len(texts), 9, np.float32)))
    panel = Panel({"red": (Reward("red", red), 2.0), "halves": (halves, -1.0), "seen": (seen, 0.0)}, Checks())
    training = panel.judge(images(1, 5, 7), prompts(0, 1, 3), training=True)
    assert training.score.tolist() == [2 - 0, 10 - 0.5, 14 - 1.5]
    assert list(training.parts) == ["red", "halves"]
    assert training.rewards.tolist() == [[1, 0], [5, 0.5], [7, 1.5]]
    judged = panel.judge(images(1, 5, 7), prompts(0, 1, 3))
    assert judged.score.tolist() == training.score.tolist()
    assert judged.parts["seen"].score.tolist() == [9, 9, 9]


def test_an_image_passes_where_all_that_count_let_it():
    def strict(least):
        return Reward("r", lambda pictures, *_: Judgement(red(pictures, *_).score, pictures[:, 0, 0, 0] >= least))

    terms = {
        "two": (strict(2), 1.0),
        "four": (strict(4), 0.5),
        "nine": (strict(9), 0.0),
        "none": (Reward("n", red), 1.0),
    }
    assert Panel(terms, Checks()).judge(images(1, 3, 5), prompts(0, 1, 2)).passed.tolist() == [False, False, True]
    assert alone(Reward("n", red)).judge(images(1), prompts(0)).passed is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_number_that_is_none_stops_the_run_or_drops_its_group(value):
    told = {"told": (says([0, 1, value, 3]), 1.0)}
    asked, pictures = prompts(4, 4, 8, 8), images(1, 3, 1, 2)
    with pytest.raises(
        ValueError, match=rf"^reward told said {value} of an image for 'prompt 8'; numbers must be finite"
    ):
        Panel(told, Checks()).judge(pictures, asked)
    panel = Panel(told, Checks(not_finite="drop"))
    verdict = panel.judge(pictures, asked)
    assert verdict.kept.tolist() == [True, True, False, False]
    assert verdict.score[:2].tolist() == [1, 3] and np.isnan(verdict.score[2:]).all()
    assert np.isnan(verdict.rewards).flatten().tolist() == [False, False, True, True]
    [trouble] = panel.troubles()
    assert (trouble.reward, trouble.kind, trouble.images) == ("told", "not_finite", 1)
    assert panel.troubles() == []


def test_a_reward_that_fails_stops_the_run_or_drops_what_it_was_asked_about():
    def broken(pictures, texts, about):
        if pictures.max() > 5:
            raise ValueError("reward told failed at line 3")
        return red(pictures, texts, about)

    told = {"told": (Reward("told", broken), 1.0), "red": (Reward("red", red), 1.0)}
    with pytest.raises(ValueError, match=r"^reward told failed at line 3; reward_checks\.failed drop would go on$"):
        Panel(told, Checks()).judge(images(1, 9), prompts(0, 1))
    panel = Panel(told, Checks(failed="drop"))
    assert panel.judge(images(1, 9, 2, 9), prompts(0, 1, 2, 1)).kept.tolist() == [True, False, True, False]
    away = Panel({"told": (Reward("told", broken, elsewhere=True), 1.0)}, Checks(failed="drop"))
    assert not away.judge(images(1, 9), prompts(0, 1)).kept.any()  # asked once: all that it was asked about
    each = Panel({"told": (Reward("told", broken, groupwise=True), 1.0)}, Checks(failed="drop"))
    assert each.judge(images(1, 2, 9, 3), prompts(0, 0, 1, 1)).kept.tolist() == [True, True, False, False]
    assert [(trouble.kind, trouble.images) for trouble in each.troubles()] == [("failed", 2)]
    with pytest.raises(ValueError, match="failed at line 3"):
        panel.try_out(prompts(0, 0), "here")  # on a black and a white picture


def test_each_prompt_is_read_before_anything_is_drawn_and_by_the_rewards_of_training_where_it_is_trained_on():
    def read(prompt, metadata):
        if metadata["half"] > 1:
            raise ValueError(f"cannot judge {prompt!r}")

    panel = Panel({"red": (Reward("red", red), 1.0), "choosy": (Reward("choosy", red, read=read), 0.0)}, Checks())
    panel.try_out(prompts(0, 1, 3), "here", training=True)
    panel.try_out(prompts(0, 1), "here")
    with pytest.raises(ValueError, match="cannot judge 'prompt 3'"):
        panel.try_out(prompts(0, 1, 3), "here")


def test_an_answer_of_another_length_is_a_failure():
    short = Reward("short", lambda pictures, *_: Judgement(np.zeros(len(pictures) - 1, np.float32)))
    with pytest.raises(ValueError, match=r"^reward short returned shape \(2,\) for 3 images"):
        alone(short).judge(images(1, 2, 3), prompts(0, 1, 2))
    one = Reward("one", lambda pictures, *_: Judgement(red(pictures, *_).score, np.ones(1, bool)))
    with pytest.raises(ValueError, match=r"^reward one returned shape \(1,\) for 2 images"):
        alone(one).judge(images(1, 2), prompts(0, 1))


@pytest.mark.parametrize(("check", "kept"), [("warn", [True] * 4), ("drop", [True, True, False, False])])
def test_a_number_out_of_range(check, kept):
    ranged = {"red": (Reward("red", red, (0.0, 5.0)), 1.0)}
    panel = Panel(ranged, Checks(out_of_range=check))
    verdict = panel.judge(images(5, 0, 6, 1), prompts(0, 0, 1, 1))
    assert verdict.kept.tolist() == kept
    [trouble] = panel.troubles()
    assert trouble.what == "reward red said 6 of an image for 'prompt 1'; its range is 0 to 5"
    with pytest.raises(ValueError, match=r"its range is 0 to 5; reward_checks\.out_of_range drop would go on"):
        Panel(ranged, Checks(out_of_range="stop")).judge(images(6), prompts(0))


def test_what_is_asked_in_evaluations_alone_drops_nothing():
    panel = Panel({"red": (Reward("red", red), 1.0), "told": (says([NAN, 1]), 0.0)}, Checks(not_finite="drop"))
    verdict = panel.judge(images(0, 1), prompts(0, 1))
    assert verdict.kept.all() and verdict.score.tolist() == [0, 1]


def asked_of(panel, *groups):
    """Let a panel judge groups of so many images, all of one value, step by step."""
    for value, count in groups:
        panel.watch(panel.judge(images(*[value] * count), prompts(*[0] * count), training=True), [0] * count)


def test_a_reward_that_always_says_the_same_is_met_after_twenty_groups():
    panel = alone(Reward("red", red))
    asked_of(panel, *[(3, 2)] * (CONSTANT - 1))
    assert panel.troubles() == []
    state, panel = json.loads(json.dumps(panel.state())), alone(Reward("red", red))
    panel.restore(state)  # as a resumed run does
    asked_of(panel, (3, 5))
    [trouble] = panel.troubles()
    assert (trouble.kind, trouble.what) == ("constant", "reward red said 3 of every image in 20 groups in a row")
    asked_of(panel, *[(3, 2)] * (CONSTANT - 1))
    assert panel.troubles() == []
    with pytest.raises(ValueError, match=r"in 20 groups in a row; reward_checks\.constant warn would go on"):
        asked_of(Panel({"red": (Reward("red", red), 1.0)}, Checks(constant="stop")), *[(3, 2)] * CONSTANT)


def test_a_step_of_training_looks_for_a_reward_that_always_says_the_same(monkeypatch):
    monkeypatch.setattr(panels, "CONSTANT", 2)
    panel = alone(Reward("red", red))
    inquiry = Inquiry(panel, prompts(0, 0, 5, 5), [0, 0, 1, 1])
    inquiry.ask(images(3, 3, 3, 3), torch.arange(4))
    inquiry.verdict()
    assert [trouble.kind for trouble in panel.troubles()] == ["constant"]


def test_one_other_number_and_it_does_not_always_say_the_same():
    panel = alone(Reward("red", red))
    asked_of(panel, *[(3, 2)] * (CONSTANT - 1), (4, 2), *[(3, 2)] * (CONSTANT - 1))
    panel.watch(panel.judge(images(3, 4), prompts(0, 0)), [0, 0])
    asked_of(panel, *[(3, 2)] * (CONSTANT - 1))
    assert panel.troubles() == []


# ---------------------------------------------------------------- groups and comparisons


def test_a_groupwise_reward_sees_one_group_a_call_wherever_its_members_stand():
    calls = []

    def judge(pictures, texts, about):
        calls.append(pictures[:, 0, 0, 0].tolist())
        assert len(set(texts)) == 1
        return Judgement(pictures[:, 0, 0, 0] - pictures[:, 0, 0, 0].mean(dtype=np.float32))

    panel = alone(Reward("above", judge, groupwise=True))
    verdict = panel.judge(images(1, 10, 3, 14), prompts(7, 2, 7, 2))
    assert calls == [[1, 3], [10, 14]]
    assert verdict.score.tolist() == [-1, -2, 1, 2]
    panel.judge(images(1, 3, 10), prompts(7, 7, 7), group=[0, 0, 1])
    assert calls[2:] == [[1, 3], [10]]


def test_wins_against_the_others_of_a_group_by_hand():
    table = {(1, 2): 0.25, (1, 3): 1.0, (2, 3): 0.5}

    @pairwise
    def better(firsts, seconds, texts):
        assert len(firsts) == len(seconds) == len(texts) == 3
        return [table[a, b] for a, b in zip(firsts[:, 0, 0, 0], seconds[:, 0, 0, 0], strict=True)]

    assert better.range == (0, 1)
    score = alone(better).judge(images(1, 2, 3), prompts(0, 0, 0)).score
    assert score.tolist() == [(0.25 + 1) / 2, (0.75 + 0.5) / 2, (0 + 0.5) / 2]
    assert alone(better).judge(images(4), prompts(0)).score.tolist() == [0.5]


def test_videos_are_compared_frame_by_frame():
    def above(pictures, texts, about):
        return Judgement((pictures[:, 0, 0, 0] > pictures[:, 0, 0, 0].mean()).astype(np.float32))

    videos = np.stack([images(1, 10, 4), images(3, 14, 4)])  # two videos of three frames
    said = on_frames(above, groupwise=True)(videos, ["a"] * 2, [{}] * 2)
    assert said.score.tolist() == pytest.approx([0, 2 / 3])  # above the frames' means of 2, 12 and 4
    assert said.passed is None


def test_a_function_that_is_to_see_a_group_and_one_that_is_async(tmp_path):
    (tmp_path / "own.py").write_text(
        "import asyncio, numpy as np\n"
        "from aegpo.rewards.own import groupwise\n"
        "@groupwise\ndef place(images, prompts): return np.argsort(np.argsort(images[:, 0, 0, 0]))\n"
        "async def later(images, prompts, metadata):\n    await asyncio.sleep(0)\n"
        "    return [m['half'] for m in metadata]\n"
        "class Times:\n"
        "    def __init__(self, by: float = 1): self.by = by\n"
        "    def __call__(self, images, prompts): return self.by * images[:, 0, 0, 0]\n"
        "class Broken:\n    def __init__(self): raise OSError('no weights')\n"
        "def one(images): return 1\n"
        "def plus(images, prompts, more=0): return images[:, 0, 0, 0] + more\n"
    )
    place = load(f"{tmp_path}/own.py:place")
    assert place.groupwise and not place.elsewhere
    assert alone(place).judge(images(9, 4, 6, 5), prompts(0, 0, 1, 1)).score.tolist() == [1, 0, 1, 0]
    later = load(f"{tmp_path}/own.py:later")
    assert later.elsewhere
    assert alone(later).judge(images(0, 0), prompts(3, 5)).score.tolist() == [1.5, 2.5]
    assert load(f"{tmp_path}/own.py:Times", by=3)(images(2, 4), ["", ""], [{}, {}]).tolist() == [6, 12]
    assert load(f"{tmp_path}/own.py:plus", more=3, range=[0, 5])(images(2), [""], [{}]).tolist() == [5]
    assert load(f"{tmp_path}/own.py:plus", range=[0, 5]).range == (0, 5)
    for name, settings, said in (
        ("Times", {"of": 1}, "does not take its settings: .*unexpected keyword argument 'of'"),
        ("plus", {"of": 1}, "does not take its settings: .*unexpected keyword argument 'of'"),
        ("place", {"of": 1}, "takes no settings but range, and of was given"),
        ("Broken", {}, "cannot be made: OSError: no weights"),
        ("one", {}, "own.py:one should take images, prompts and maybe metadata: too many positional arguments"),
        ("plus", {"range": [5, 0]}, r"range: should be \[lowest, highest\]"),
        ("plus", {"range": "wide"}, "range: .*valid tuple"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            load(f"{tmp_path}/own.py:{name}", **settings)
        assert "\n" not in str(error.value)


def test_settings_of_a_shipped_reward_are_checked():
    with pytest.raises(
        ValueError, match=r"^reward: pickscore has no setting 'foldr'; it has folder, range; did you mean folder"
    ):
        load("pickscore", foldr="x")
    with pytest.raises(ValueError, match=r"^reward: pickscore: folder: input should be a valid string, got 3"):
        load("pickscore", folder=3)
    with pytest.raises(ValueError, match=r"^reward: pickscore=x gives folder already; it is given again as a setting"):
        load("pickscore=x", folder="x")


# ---------------------------------------------------------------- advantages


def credited(rewards, combine, weights=(1.0,), algorithm="flow-grpo", rollouts=(3, 4), **how):
    """Advantages of two prompts' rollouts that explore one step each, and which steps are learned from."""
    config = resolve(
        {"algorithm": algorithm, "sampler": {"steps": 3}, "prompts_per_step": len(rollouts), "rollouts_per_step": 12},
        {
            "advantage": {"combine": combine} | how,
            "exploration": {"share": 1, "k": 1},
            "allocation": {"rule": "uniform"},
        },
    )
    explored = torch.zeros(len(rollouts), 3, dtype=torch.bool)
    explored[torch.arange(len(rollouts)), torch.arange(len(rollouts)) % 2] = True
    plan = Plan(torch.tensor(rollouts), explored, torch.ones(len(rollouts), 3, dtype=torch.float64))
    asked = prompts(*range(len(rollouts)))
    courses = lay_out(plan, config, asked, torch.tensor([1.0, 0.6, 0.3, 0.0]), 0)
    advantage, taught = credit(config, rewards, plan.group, courses, weights)
    assert (advantage[~courses.explored] == 0).all()
    return advantage.sum(1), taught


REWARDS = torch.tensor([[1.0, 10.0], [2, 10], [4, 40], [0, 5], [0, 9], [3, 9], [1, 1]])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def test_advantages_of_the_sum_are_those_of_one_reward():
    found, _ = credited(REWARDS, "rewards", (1.0, -0.5), std="group")
    torch.testing.assert_close(found, group_advantages(REWARDS @ torch.tensor([1.0, -0.5]), GROUP))


def test_the_sum_of_advantages_is_bounded_once():
    found, _ = credited(REWARDS, "advantages", (1.0, -0.5), clip=0.9, std="group")
    each = [group_advantages(one, GROUP, clip=99.0) for one in REWARDS.T]
    torch.testing.assert_close(found, (each[0] - 0.5 * each[1]).clamp(-0.9, 0.9))


@pytest.mark.parametrize("algorithm", ["flow-grpo", "dance-grpo", "aegpo"])  # of other deviations than GDPO's
def test_gdpo_where_all_explore_alike_is_its_formula(algorithm):
    own = {"best_of": 0, "eps": 1e-4}
    found, _ = credited(REWARDS, "gdpo", (1.0, -0.5), algorithm, **own)
    torch.testing.assert_close(found, gdpo(REWARDS, GROUP, torch.tensor([1.0, -0.5])))
    one, _ = credited(REWARDS[:, :1], "gdpo", (1.0,), algorithm, **own)
    torch.testing.assert_close(one, gdpo(REWARDS[:, :1], GROUP, torch.ones(1)))


@pytest.mark.parametrize("combine", ["rewards", "advantages", "gdpo"])
def test_a_group_whose_rewards_are_all_equal_teaches_nothing_to_the_bit(combine):
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        weights = torch.rand(3, generator=generator).tolist()
        rows = torch.rand(3, 3, generator=generator).repeat_interleave(torch.tensor([9, 11, 10]), 0)
        found, _ = credited(rows, combine, weights, "dance-grpo", (9, 11, 10), best_of=0)  # whose eps is 1e-8
        assert (found == 0).all()


@pytest.mark.parametrize("combine", ["rewards", "advantages", "gdpo"])
@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("best_of", [0, 2])
def test_a_group_that_is_dropped_is_as_if_it_had_not_been_there(combine, std, best_of):
    part, few = REWARDS.clone(), {"std": std, "best_of": best_of}
    part[:3] = NAN
    found, taught = credited(part, combine, (1.0, 0.5), **few)
    assert (found[:3] == 0).all() and not taught[:3].any()
    alone_, taught_alone = credited(REWARDS[3:], combine, (1.0, 0.5), rollouts=(4,), **few)
    torch.testing.assert_close(found[3:], alone_)
    assert torch.equal(taught[3:].any(1), taught_alone.any(1))
    nothing, taught = credited(torch.full_like(REWARDS, NAN), combine, (1.0, 0.5), **few)
    assert (nothing == 0).all() and not taught.any()


def test_the_best_and_the_worst_are_those_of_the_sum():
    _, taught = credited(REWARDS, "gdpo", (1.0, -1.0), best_of=2)
    total = REWARDS @ torch.tensor([1.0, -1.0])  # -9, -8, -36 | -5, -9, -6, 0
    assert total.tolist() == [-9, -8, -36, -5, -9, -6, 0]
    assert taught.any(1).tolist() == [False, True, True, False, True, False, True]


# ---------------------------------------------------------------- at the same time


def test_rewards_elsewhere_are_asked_at_once_and_waited_for_at_the_end():
    both = threading.Barrier(2, timeout=20)

    def judge(pictures, texts, about):
        both.wait()  # passes only if two are being asked at the same time
        return red(pictures, texts, about)

    terms = {"a": (Reward("a", judge, elsewhere=True), 1.0), "b": (Reward("b", judge, elsewhere=True), 1.0)}
    assert Panel(terms, Checks()).judge(images(2, 3), prompts(0, 1)).score.tolist() == [4, 6]


def test_a_program_that_is_stopped_does_not_wait_for_a_reward_elsewhere():
    code = (
        "import time, numpy as np\n"
        "from aegpo.rewards import Reward\n"
        "from aegpo.rewards.panel import alone\n"
        "from aegpo.types import Prompt\n"
        "slow = alone(Reward('slow', lambda *asked: time.sleep(600), elsewhere=True))\n"
        "slow.ask(np.zeros((1, 2, 2, 3), np.uint8), [Prompt(0, '', {})])\n"
        "raise KeyboardInterrupt\n"
    )
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert stopped.stderr.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("elsewhere", [True, False])
def test_an_error_of_any_kind_is_a_failure(elsewhere):
    def judge(*asked):
        raise MemoryError("too large")

    with pytest.raises(ValueError, match=r"^reward a failed: MemoryError: too large; reward_checks\.failed drop would"):
        alone(Reward("a", judge, elsewhere=elsewhere)).judge(images(1), prompts(0))
    dropped = Panel({"a": (Reward("a", judge, elsewhere=elsewhere), 1.0)}, Checks(failed="drop"))
    assert dropped.judge(images(1), prompts(0)).kept.tolist() == [False]
    assert [trouble.what for trouble in dropped.troubles()] == ["reward a failed: MemoryError: too large"]


def test_only_a_reward_that_is_asked_in_training_is_a_reason_to_draw_in_parts():
    here, away = Reward("here", red), Reward("away", red, elsewhere=True)
    assert not Panel({"here": (here, 1.0), "away": (away, 0.0)}, Checks()).elsewhere
    assert Panel({"here": (here, 1.0), "away": (away, -0.5)}, Checks()).elsewhere


def test_the_next_images_in_order_are_asked_about():
    inquiry = Inquiry(alone(Reward("a", red)), prompts(0, 0, 5), [0, 0, 1])
    inquiry.ask(images(3), torch.tensor([0]))
    with pytest.raises(AssertionError):
        inquiry.ask(images(3), torch.tensor([2]))


def test_what_is_async_runs_in_one_loop_and_a_file_is_run_once(tmp_path):
    (tmp_path / "own.py").write_text(
        "import asyncio\n"
        "RUN = []\n"
        "class Client:\n"
        "    def __init__(self): self.loops = set()\n"
        "    async def __call__(self, images, prompts):\n"
        "        self.loops.add(asyncio.get_running_loop())\n"
        "        return [float(len(self.loops))] * len(images)\n"
        "async def bye(images, prompts): raise SystemExit('bye')\n"
        "def ran(images, prompts):\n    RUN.append(1)\n    return [float(len(RUN))] * len(images)\n"
        "def again(images, prompts): return ran(images, prompts)\n"
    )
    client = load(f"{tmp_path}/own.py:Client")
    assert client.elsewhere
    with pytest.raises(ValueError, match=r"bye failed at own\.py, line \d+: RuntimeError: SystemExit: bye"):
        load(f"{tmp_path}/own.py:bye").judge(images(1), ["a"], [{}])  # and the loop goes on
    for _ in range(3):
        assert alone(client).judge(images(1), prompts(0)).score.tolist() == [1]
    ran, again = (load(f"{tmp_path}/own.py:{name}") for name in ("ran", "again"))
    assert [reward(images(1), ["a"], [{}]).tolist() for reward in (ran, again)] == [[1], [2]]


def test_parts_of_a_step_are_put_together_in_order():
    released = threading.Event()

    def judge(pictures, texts, about):
        if pictures[0, 0, 0, 0] == 1:
            released.wait(20)  # the first part is answered last
        else:
            released.set()
        return red(pictures, texts, about)

    inquiry = Inquiry(alone(Reward("a", judge, elsewhere=True)), prompts(0, 0, 5), [0, 0, 1])
    inquiry.ask(images(1, 2), torch.tensor([0, 1]))
    inquiry.ask(images(3), torch.tensor([2]))
    verdict = inquiry.verdict()
    assert verdict.score.tolist() == [1, 2, 3] and verdict.kept.all()


def told(score, passed):
    """What a panel says of one image."""
    said = Judgement(np.array([score], np.float32), None if passed is None else np.array([passed]))
    return Verdict(2 * said.score, said.passed, {"a": said}, said.score[:, None], (2.0,), np.array([bool(passed)]))


def test_verdicts_are_joined_with_what_each_reward_said():
    both = Verdict.joined([told(1, True), told(3, False)])
    assert both.score.tolist() == [2, 6] and both.passed.tolist() == both.kept.tolist() == [True, False]
    assert both.parts["a"].score.tolist() == [1, 3] and both.parts["a"].passed.tolist() == [True, False]
    assert both.rewards.tolist() == [[1], [3]] and both.weights == (2.0,)
    some = Verdict.joined([told(1, True), told(3, None)])  # one call of two failed
    assert some.passed is None and some.parts["a"].passed is None and some.score.tolist() == [2, 6]
