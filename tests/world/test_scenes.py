import json

import numpy as np
import pytest

from aegpo import world
from aegpo.world import prompts, scenes
from aegpo.world.scenes import COLORS, SHAPES, Placed, Request


@pytest.mark.parametrize("task", [None, *scenes.TASKS])
def test_parse_reads_back_what_write_wrote(task):
    rng = np.random.default_rng(1)
    for _ in range(300):
        request = scenes.random_request(rng, task)
        assert scenes.parse(scenes.write(request, rng)) == request


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_request_of_a_task_knows_its_task(task):
    rng = np.random.default_rng(2)
    assert {scenes.random_request(rng, task).task for _ in range(100)} == {task}


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        ("a red circle above a blue square", Request((("circle", "red"), ("square", "blue")), "above")),
        ("A ring that is black under a cross", Request((("ring", "black"), ("cross", None)), "below")),
        ("three  crosses", Request((("cross", None),) * 3)),
        ("a square to the left of a triangle", Request((("square", None), ("triangle", None)), "left of")),
    ],
)
def test_parse_reads_plain_english(prompt, request_):
    assert scenes.parse(prompt) == request_


@pytest.mark.parametrize("prompt", ["a sunset", "show red", "", "four circles and four squares"])
def test_parse_refuses_what_the_world_cannot_show(prompt):
    with pytest.raises(ValueError, match="one to four of these shapes"):
        scenes.parse(prompt)


@pytest.mark.parametrize(
    "prompt", ["two circles above a square", "a circle and a square above a ring", "above a square there is a circle"]
)
def test_parse_refuses_a_relation_that_is_not_between_two(prompt):
    with pytest.raises(ValueError, match="must stand between two single objects"):
        scenes.parse(prompt)


def test_every_word_that_is_written_is_in_the_vocabulary():
    rng = np.random.default_rng(3)
    written = {w for _ in range(3000) for w in scenes.write(scenes.random_request(rng), rng).split()}
    assert written <= scenes.words()
    assert world.unknown_words("A purple elephant above a circle.") == ["elephant", "circle."]


def test_prompt_files_are_what_the_generator_writes_and_disjoint():
    train, held = world.training(), world.held_out()
    generated = [json.loads(json.dumps(rows)) for rows in prompts.prompt_sets()]
    assert [train, held] == generated
    assert len(train) >= 500
    assert len(held) >= 120
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert len({row["prompt"] for row in train}) == len(train)
    for rows in (train, held):
        assert {row["task"] for row in rows} == set(scenes.TASKS)
        for row in rows:
            asked = scenes.parse(row["prompt"])
            assert [list(item) for item in asked.objects] == row["objects"]
            assert (asked.relation, asked.task) == (row["relation"], row["task"])


MANY = ("colors", "position", "color_attribution")


def test_tasks_with_many_requests_hold_whole_requests_out():
    def asked(rows):
        return {(str(r["objects"]), r["relation"]) for r in rows if r["task"] in MANY}

    assert not asked(world.training()) & asked(world.held_out())


def test_objects_of_a_scene_keep_apart_and_stand_as_asked():
    rng = np.random.default_rng(4)
    for _ in range(300):
        request = scenes.random_request(rng)
        scene = scenes.arrange(request, rng)
        assert [item.shape for item in scene] == [shape for shape, _ in request.objects]
        assert all(c is None or item.color == c for item, (_, c) in zip(scene, request.objects, strict=True))
        for i, a in enumerate(scene):
            assert 1 <= a.x - a.radius <= a.x + a.radius <= scenes.SIZE - 1
            for b in scene[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius >= 2
        if request.relation:
            assert scenes.related((scene[0].x, scene[0].y), (scene[1].x, scene[1].y), request.relation)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("square", 4), ("circle", np.pi), ("triangle", 2), ("ring", np.pi * 0.75), ("cross", 4 * (0.7 - 0.35**2))],
)
def test_a_drawn_shape_covers_its_geometric_area(shape, area):
    image = scenes.draw((Placed(shape, "black", 16, 16, 6),), supersample=16)
    ink = (np.float64(scenes.BACKGROUND) - image)[..., 0] / (scenes.BACKGROUND[0] - COLORS["black"][0])
    assert ink.sum() == pytest.approx(area * 36, rel=0.02)


def test_every_colour_and_shape_can_be_drawn():
    for color, rgb in COLORS.items():
        for shape in SHAPES:
            image = scenes.draw((Placed(shape, color, 16, 16, 6),))
            assert (image == rgb).all(-1).sum() > 20
