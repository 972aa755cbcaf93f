import numpy as np
import pytest

from aegpo import world
from aegpo.world import scenes
from aegpo.world.scenes import Request
from aegpo.world.verifier import Found, detect, score


def examples(count, seed, task=None):
    rng = np.random.default_rng(seed)
    requests = [scenes.random_request(rng, task) for _ in range(count)]
    drawn = [scenes.arrange(request, rng) for request in requests]
    return requests, drawn, np.stack([scenes.draw(scene) for scene in drawn]), rng


def row(request):
    return {"objects": request.objects, "relation": request.relation}


@pytest.mark.parametrize("task", scenes.TASKS)
def test_ground_truth_passes(task):
    requests, _, images, _ = examples(400, 0, task)
    scores, passed = world.verify(images, None, [row(r) for r in requests])
    assert passed.mean() >= 0.99
    assert scores.dtype == np.float32


def test_a_shuffled_caption_scores_what_the_scene_itself_scores():
    """The pictures are read rightly, so a wrong caption gets what chance gives: the score of the scene's own list."""
    requests, drawn, images, rng = examples(600, 1)
    shuffled = [requests[i] for i in rng.permutation(len(requests))]
    truth = [
        score([Found(item.shape, item.color, item.x, item.y) for item in scene], request)
        for scene, request in zip(drawn, shuffled, strict=True)
    ]
    seen, _ = world.verify(images, None, [row(r) for r in shuffled])
    assert np.mean(np.abs(seen - truth) > 1e-6) <= 0.01
    assert seen.mean() == pytest.approx(np.mean(truth), abs=0.005)
    assert seen.mean() < 0.35


def test_the_prompt_alone_serves_where_there_is_no_metadata():
    requests, _, images, rng = examples(50, 2)
    written = [scenes.write(r, rng) for r in requests]
    assert (world.verify(images, written)[0] == world.verify(images, None, [row(r) for r in requests])[0]).all()


A, B = Found("circle", "red", 8, 8), Found("square", "blue", 24, 8)
BOTH = (("circle", "red"), ("square", "blue"))


@pytest.mark.parametrize(
    ("found", "request_", "value"),
    [
        ([A, B], Request(BOTH), 1.0),
        ([A, B], Request(BOTH, "left of"), 1.0),
        ([A, B], Request(BOTH, "right of"), 0.7),
        ([A], Request(BOTH), 0.5),
        ([A, B, B], Request(BOTH), 2 / 3),
        ([], Request(BOTH), 0.0),
        ([Found("circle", "blue", 8, 8), Found("square", "red", 24, 8)], Request(BOTH), 0.5),
        ([A, A, A], Request((("circle", None),) * 2), 2 / 3),
        ([A], Request((("circle", None),) * 4), 0.25),
        ([Found(None, "red", 8, 8)], Request((("circle", "red"),)), 0.5),
        ([Found(None, "red", 8, 8)], Request((("circle", None),)), 0.0),
        ([B, Found("circle", "black", 8, 20)], Request((("circle", None), ("square", None)), "below"), 0.7),
        ([B, Found("circle", "black", 23, 20)], Request((("circle", None), ("square", None)), "below"), 1.0),
    ],
)
def test_score_by_hand(found, request_, value):
    assert score(found, request_) == pytest.approx(value, abs=1e-12)


def test_noise_and_blank_pictures_hold_nothing_that_passes():
    rng = np.random.default_rng(3)
    blank = np.broadcast_to(np.uint8(scenes.BACKGROUND), (1, 32, 32, 3))
    noise = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    assert detect(blank[0]) == []
    wanted = [row(Request((("circle", None),)))] * 51
    assert not world.verify(np.concatenate([blank, noise]), None, wanted)[1].any()


def test_a_two_coloured_object_has_no_colour_and_a_speck_is_no_object():
    image = scenes.draw((scenes.Placed("square", "red", 16, 16, 6),))
    image[:, 16:][(image[:, 16:] == scenes.COLORS["red"]).all(-1)] = scenes.COLORS["blue"]
    image[2:4, 2:4] = 0
    assert [(f.shape, f.color) for f in detect(image)] == [("square", None)]


@pytest.mark.parametrize("shape", ["square", "circle"])
def test_a_flooded_picture_and_a_shape_cut_by_the_border_do_not_pass(shape):
    black = np.zeros((32, 32, 3), np.uint8)
    cut = scenes.draw((scenes.Placed(shape, "black", 3, 16, 6),))
    large = scenes.draw((scenes.Placed(shape, "black", 16, 16, 12),))
    _, passed = world.verify(np.stack([black, cut, large]), [f"a black {shape}"] * 3)
    assert not passed.any()


def test_metadata_that_says_nothing_useful_is_named():
    with pytest.raises(ValueError, match="objects must be a list"):
        world.verify(np.zeros((1, 32, 32, 3), np.uint8), ["a ring"], [{"objects": ["ring"]}])


def test_a_pass_is_everything_right_and_nothing_else():
    picture = scenes.draw((scenes.Placed("circle", "red", 8, 16, 5), scenes.Placed("square", "blue", 24, 16, 5)))
    asked = [Request(BOTH, "left of"), Request(BOTH, "right of"), Request(BOTH[:1]), Request((*BOTH, ("ring", None)))]
    scores, passed = world.verify(np.stack([picture] * 4), None, [row(request) for request in asked])
    assert scores.tolist() == pytest.approx([1, 0.7, 0.5, 2 / 3])
    assert passed.tolist() == [True, False, False, False]
