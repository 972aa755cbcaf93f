"""Object checks: GenEval's rules on boxes by hand, and the networks against transformers' own processors."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from aegpo import rewards
from aegpo.data import load_prompts
from aegpo.rewards.clip import Clip
from aegpo.rewards.object_checks import (
    CLASSES,
    Colors,
    Detector,
    Found,
    _found,
    checks,
    colored,
    read,
    relations,
    resized,
)
from aegpo.rewards.weights import Source
from tests.rewards.small import CONFIG, SIZE, on_the_hub, pictures, shaken, spelling_tokenizer

HUB = "facebook/mask2former-swin-small-coco-instance"
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
BACKBONE = {
    **{"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "drop_path_rate": 0.3},
    **{"out_features": ["stage1", "stage2", "stage3", "stage4"]},
}
SIZES = {
    **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16},
    **{"dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "num_queries": 12},
}


# ---------------------------------------------------------------- rules, on boxes by hand

LEFT, RIGHT = [0, 0, 10, 10], [50, 0, 60, 10]


def found(*objects):
    """(class, score, box) each; what is in the box is its mask."""
    masks = np.zeros((len(objects), 100, 100), bool)
    for mask, (_, _, (left, top, right, bottom)) in zip(masks, objects, strict=True):
        mask[top:bottom, left:right] = True
    boxes = np.array([box for *_, box in objects], float).reshape(-1, 4)
    classes = np.array([CLASSES.index(name) for name, *_ in objects], int)
    return Found(boxes, classes, np.array([score for _, score, _ in objects], np.float32), masks)


def held(metadata, *objects, colors=()):
    """Which checks hold, as 0s and 1s; colours are in the order of the objects."""
    return "".join(
        str(int(one)) for one in checks(read("a prompt", metadata), found(*objects), dict(enumerate(colors)))
    )


def of(*entries, **rest):
    return {"tag": "two_object", "include": list(entries), **rest}


def test_an_object_that_is_there_and_one_that_is_not():
    bench, dog = {"class": "bench", "count": 1}, {"class": "dog", "count": 1}
    assert held(of(bench), ("bench", 0.8, LEFT)) == "1"
    assert held(of(bench), ("dog", 0.8, LEFT)) == "0"
    assert held(of(bench)) == "0"
    assert held(of(bench, dog), ("dog", 0.8, LEFT)) == "01"
    assert held(of(bench, dog), ("dog", 0.8, LEFT), ("bench", 0.5, RIGHT)) == "11"


@pytest.mark.parametrize(("tag", "least"), [("single_object", 0.3), ("counting", 0.9), (None, 0.3)])
def test_only_what_scores_more_than_the_threshold_is_there(tag, least):
    asked = {"tag": tag, "include": [{"class": "cat", "count": 1}]}
    assert held(asked, ("cat", np.nextafter(np.float32(least), 1), LEFT)) == "1"
    assert held(asked, ("cat", least, LEFT)) == "0"
    assert held(asked, ("cat", least - 0.01, LEFT)) == "0"


@pytest.mark.parametrize(
    ("there", "said"), [(0, "0001"), (1, "1001"), (2, "1101"), (3, "1111"), (4, "1110"), (9, "1110")]
)
def test_three_and_no_more(there, said):
    asked = of({"class": "cup", "count": 3}, exclude=[{"class": "cup", "count": 4}], tag="counting")
    assert held(asked, *[("cup", 0.95, [9 * i, 0, 9 * i + 8, 8]) for i in range(there)]) == said
    assert held(asked, *[("cup", 0.85, LEFT)] * 3, *[("cup", 0.95, LEFT)] * there) == said


def test_detections_of_one_thing_all_count():
    """GenEval's largest overlap is 1 by default, which drops none; and no more than 16 of a class are looked at."""
    twice = [("cup", 0.95, LEFT), ("cup", 0.92, LEFT)]
    assert held(of({"class": "cup", "count": 2}), *twice) == "11"
    assert held(of({"class": "cup", "count": 1}, exclude=[{"class": "cup", "count": 2}]), *twice) == "10"
    many = [("cup", 0.95, LEFT)] * 20
    assert held(of({"class": "cup", "count": 1}, exclude=[{"class": "cup", "count": 16}]), *many) == "10"
    assert held(of({"class": "cup", "count": 1}, exclude=[{"class": "cup", "count": 17}]), *many) == "11"


def test_excluding_another_class():
    asked = of({"class": "cup", "count": 1}, exclude=[{"class": "dog", "count": 1}, {"class": "cat", "count": 2}])
    assert held(asked, ("cup", 0.5, LEFT), ("cat", 0.5, LEFT)) == "111"
    assert held(asked, ("cup", 0.5, LEFT), ("dog", 0.31, LEFT), ("cat", 0.5, LEFT), ("cat", 0.4, RIGHT)) == "100"


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([20, 20, 30, 30], {"right of", "below"}),  # the same offset on both axes: (20 - 2) / 28.3 = 0.64
        ([0, 20, 10, 30], {"below"}),
        ([20, 0, 30, 10], {"right of"}),
        ([20, 10, 30, 20], {"right of"}),  # (20 - 2) / 22.4 and (10 - 2) / 22.4 = 0.36
        ([5, 0, 15, 10], {"right of"}),  # (5 - 2) / 5 = 0.6
        ([4, 0, 14, 10], set()),  # (4 - 2) / 4 = 0.5, and more is due
        ([2, 0, 12, 10], set()),
        ([0, 0, 10, 10], set()),
        ([10, 0, 90, 10], {"right of"}),  # centres 45 apart, a tenth of the widths 9
        ([-10, 0, 90, 10], {"right of"}),  # 35 and 11: 0.69
        ([-10, 0, 50, 10], {"right of"}),  # 15 and 7: 0.53
        ([-10, 0, 48, 10], {"right of"}),  # 14 and 6.8: 0.514
        ([-10, 0, 46, 10], set()),  # 13 and 6.6: 0.49
        ([0, -10, 10, 48], {"below"}),
        ([0, -10, 10, 46], set()),
    ],
)
def test_relations_by_hand(box, said):
    box, other = np.array(box, float), np.array([0, 0, 10, 10], float)
    turned = {"right of": "left of", "below": "above"}
    assert relations(box, other) == said
    assert relations(other, box) == {turned[relation] for relation in said}


@pytest.mark.parametrize(
    ("relation", "box"),
    [
        ("left of", [10, 40, 20, 50]),
        ("right of", [80, 40, 90, 50]),
        ("above", [40, 10, 50, 20]),
        ("below", [40, 80, 50, 90]),
    ],
)
def test_a_position_is_towards_the_entry_that_it_names(relation, box):
    cup, dog = ("cup", 0.8, [40, 40, 50, 50]), {"class": "dog", "count": 1, "position": [relation, 0]}
    asked = of({"class": "cup", "count": 1}, dog)
    assert held(asked, cup, ("dog", 0.8, box)) == "111"
    assert held(asked, ("cup", 0.8, box), ("dog", 0.8, [40, 40, 50, 50])) == "110"
    assert held(asked, cup) == "100"
    assert held(asked, ("dog", 0.8, box)) == "010"  # nothing that it could stand beside
    assert held(asked, cup, ("dog", 0.8, [40, 40, 50, 50]), ("dog", 0.7, box)) == "110"  # the most certain one is asked
    assert held(asked, cup, ("dog", 0.7, [40, 40, 50, 50]), ("dog", 0.8, box)) == "111"


def test_a_position_is_towards_all_of_them():
    cups, dogs = {"class": "cup", "count": 2}, {"class": "dog", "count": 2, "position": ("left of", 0)}
    two = [("cup", 0.8, [60, 0, 70, 10]), ("cup", 0.7, [30, 0, 40, 10])]
    assert held(of(cups, dogs), *two, ("dog", 0.8, [0, 0, 9, 9]), ("dog", 0.7, [10, 0, 19, 9])) == "111111"
    assert held(of(cups, dogs), *two, ("dog", 0.8, [45, 0, 54, 9]), ("dog", 0.7, [10, 0, 19, 9])) == "111101"
    assert held(of(cups, dogs), *two, ("dog", 0.8, [0, 0, 9, 9])) == "111010"
    assert held(of(cups, dogs), two[0], ("dog", 0.8, [0, 0, 9, 9]), ("dog", 0.7, [10, 0, 19, 9])) == "101100"
    third = {"class": "cat", "count": 1, "position": ("below", 1)}
    asked = of({"class": "cup", "count": 1}, {"class": "dog", "count": 1}, third)
    assert held(asked, two[0], ("dog", 0.8, [0, 0, 9, 9]), ("cat", 0.8, [0, 40, 9, 49])) == "1111"
    assert held(asked, two[0], ("dog", 0.8, [0, 40, 9, 49]), ("cat", 0.8, [60, 40, 69, 49])) == "1110"


def test_colors_are_those_of_the_most_certain():
    asked = of({"class": "cup", "count": 2, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"})
    cups = [("cup", 0.5, LEFT), ("cup", 0.8, LEFT), ("cup", 0.7, RIGHT)]
    assert colored(read("a prompt", asked), found(*cups, ("cat", 0.9, LEFT), ("dog", 0.3, LEFT))) == [1, 2]
    assert held(asked, *cups, colors=["blue", "red", "red"]) == "111100"
    assert held(asked, *cups, colors=["red", "red", "blue"]) == "111000"
    assert held(asked, cups[0], ("dog", 0.8, LEFT), colors=["red", "blue"]) == "101011"
    assert held(asked, cups[0], ("dog", 0.8, LEFT), colors=["red", "black"]) == "101010"


def test_an_object_is_cut_out_onto_grey():
    image = pictures(1, 100, 100)[0]
    there = found(("dog", 0.8, [20, 30, 60, 50]))
    there.masks[0, 30:40, 20:25] = False
    cut = image[30:50, 20:60].copy()
    cut[:10, :5] = 153
    assert (there.cut(image, 0) == cut).all()


# ---------------------------------------------------------------- metadata

GENEVAL = """\
{"tag": "single_object", "include": [{"class": "tv remote", "count": 1}], "prompt": "a photo of a tv remote"}
{"tag": "counting", "include": [{"class": "bus", "count": 2}], "exclude": [{"class": "bus", "count": 3}], "prompt": "a"}
{"tag": "position", "include": [{"class": "computer mouse", "count": 1}, \
{"class": "hair drier", "count": 1, "position": ["left of", 0]}], "prompt": "a hair drier left of a computer mouse"}
{"tag": "color_attr", "include": [{"class": "computer keyboard", "count": 1, "color": "pink"}, \
{"class": "potted plant", "count": 1, "color": "white"}], "prompt": "a pink computer keyboard and a white potted plant"}
"""


def test_genevals_prompt_file_is_read_as_it_is(tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text(GENEVAL)
    prompts = load_prompts(str(tmp_path / "evaluation_metadata.jsonl"), "train")
    lines = [json.loads(line) for line in GENEVAL.splitlines()]
    for prompt, line in zip(prompts, lines, strict=True):
        said = read(prompt.text, prompt.metadata).model_dump(by_alias=True, exclude_none=True, mode="json")
        assert said == {key: line[key] for key in ("tag", "include", "exclude") if key in line}


def test_absent_parts_may_be_null_as_a_table_has_them():
    entry = {"class": "bus", "count": 1, "color": None, "position": None}
    assert held({"tag": None, "include": [entry], "exclude": None}, ("bus", 0.8, LEFT)) == "1"


def test_the_classes_are_cocos():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    places = {"person": 0, "fire hydrant": 10, "elephant": 20, "skis": 30, "wine glass": 40, "broccoli": 50}
    places |= {"dining table": 60, "computer mouse": 64, "toaster": 70, "toothbrush": 79}
    assert {name: CLASSES.index(name) for name in places} == places


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"its metadata should have include, as in include: \[{class: bench, count: 1}\]$"),
        ({"include": []}, r"include: list should have at least 1 item .*, got \[\]$"),
        ({"include": "bench"}, "include: input should be a valid list, got 'bench'$"),
        (of({"class": "bench"}), r"include\.0\.count: field required, got {'class': 'bench'}$"),
        (of({"count": 1}), r"include\.0\.class: field required"),
        (of({"class": "bench", "count": 0}), r"include\.0\.count: .* greater than or equal to 1, got 0$"),
        (of({"class": "bench", "count": 17}), r"include\.0\.count: .* less than or equal to 16, got 17$"),
        (
            of({"class": "keyboard", "count": 1}),
            r"include\.0\.class: should be one of COCO's 80 classes, by GenEval's names",
        ),
        (of({"class": "keyboard", "count": 1}), r"did you mean computer keyboard\?, got 'keyboard'$"),
        (
            of({"class": "cup", "count": 1}, exclude=[{"class": "cups", "count": 2}]),
            r"exclude\.0\.class: .* mean cup\?",
        ),
        (of({"class": "cup", "count": 1, "color": "teal"}), r"include\.0\.color: .* 'red', 'orange'.* got 'teal'$"),
        (
            of({"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}),
            r"include\.1\.position\.0: input should be 'left of', 'right of', 'above' or 'below', got 'near'$",
        ),
        (
            of({"class": "cup", "count": 1, "position": ["above", 0]}),
            r"include\.0\.position\.1: .* before its own, .* got 0$",
        ),
        (of({"class": "cup", "count": 1, "position": ["above", -1]}), r"include\.0\.position\.1: .* got -1$"),
        (of({"class": "cup", "count": 1, "position": "above"}), r"include\.0\.position: input should be a valid tuple"),
    ],
)
def test_metadata_that_will_not_do(metadata, message):
    with pytest.raises(ValueError, match=f"^reward: object_checks: prompt 'a cup': .*{message}") as raised:
        read("a cup", metadata)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A detector that finds much, and other classes in each picture."""
    folder = tmp_path_factory.mktemp("detector")
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=SwinConfig(**BACKBONE), num_labels=80, **SIZES)
    )
    shaken(model)
    with torch.no_grad():
        model.class_predictor.weight *= 4
        model.class_predictor.bias.zero_()
        model.model.transformer_module.queries_features.weight *= 10
        model.model.transformer_module.queries_embedder.weight *= 10
        model.model.pixel_level_module.decoder.mask_projection.bias.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text = CONFIG["text_config"] | {"max_position_embeddings": 48}
    model = shaken(CLIPModel(CLIPConfig(**CONFIG | {"text_config": text})))
    with torch.no_grad():
        model.vision_model.embeddings.patch_embedding.weight *= 4
        model.text_model.embeddings.token_embedding.weight *= 4
    model.save_pretrained(folder)
    spelling_tokenizer().save_pretrained(folder)
    return folder


def detect(folder, images):
    return Detector(Source("object_checks", HUB, HUB, str(folder)))(images)


def load(folder, **settings):
    return rewards.load(f"object_checks={folder}", **settings)


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (300, 401), (401, 300), (800, 800), (1024, 768), (64, 512), (512, 100), (90, 150)]
)
def test_what_the_detector_sees_is_what_transformers_shows_it(height, width):
    images = pictures(1, height, width)
    theirs = Mask2FormerImageProcessorPil()(images[0], return_tensors="pt").pixel_values
    torch.testing.assert_close(resized(images), theirs, rtol=0, atol=1e-5)


def test_a_detection_by_hand():
    """Softmax over the class and none, times the mean of the mask where it is more than half."""
    classes = torch.full((4, 81), -50.0)
    chances = [{17: 0.8, 80: 0.2}, {17: 0.5, 3: 0.4, 80: 0.1}, {80: 0.71, 5: 0.29}, {9: 0.4, 80: 0.6}]
    for logits, each in zip(classes, chances, strict=True):
        for number, chance in each.items():
            logits[number] = np.log(chance)
    masks = torch.full((4, 30, 40), -3.0)
    masks[0, 4:9, 7:20] = np.log(3)  # 0.75
    masks[0, 4, 7] = np.log(9)  # 0.9
    masks[1, 29, 39] = masks[2, :, :] = 20
    masks[3, 5:8, 5:8] = 0.1  # 0.525: a score of 0.21, which is too little
    ours = _found(classes, masks, (30, 40))
    order = np.argsort(-ours.scores)
    assert ours.classes[order].tolist() == [17, 17, 3]
    assert ours.scores[order] == pytest.approx([0.8 * (64 * 0.75 + 0.9) / 65, 0.5, 0.4], abs=1e-5)
    assert ours.boxes[order].tolist() == [[7, 4, 20, 9], [39, 29, 40, 30], [39, 29, 40, 30]]
    assert (ours.masks[order[0]] == (masks[0].numpy() > 0)).all()
    assert _found(classes, torch.full((4, 30, 40), -3.0), (30, 40)).boxes.shape == (0, 4)


def test_what_is_found_is_what_transformers_finds(folder):
    """Which looks at masks of 384 × 384, so that a picture of this size is seen as it is."""
    images = pictures(2, 384, 384)
    model, processor = (
        Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval(),
        Mask2FormerImageProcessorPil(),
    )
    with torch.no_grad():
        output = model(**processor([*images], return_tensors="pt"))
    theirs = processor.post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    for ours, their in zip(detect(folder, images), theirs, strict=True):
        assert len(set(ours.names)) > 2
        assert 0.3 < ours.scores.min() < 0.5 < ours.scores.max()
        assert ours.classes.tolist() == [one["label_id"] for one in their["segments_info"]]
        assert ours.scores == pytest.approx([one["score"] for one in their["segments_info"]], abs=1e-5)
        assert (ours.masks == their["segmentation"].numpy().astype(bool)).mean() > 0.9999
        for mask, (left, top, right, bottom) in zip(ours.masks, ours.boxes.astype(int), strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert all(edge.any() for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))


def asked_of(i, there):
    """What holds in part: the most certain class in the i-th color, others left of it, and one that is too much."""
    best = list(dict.fromkeys(there.names[place] for place in np.argsort(-there.scores)))
    beside = {"class": best[1], "count": 1 + i % 3, "position": ["left of", 0]}
    include = [{"class": best[0], "count": 1 + i % 2, "color": COLORS[i]}, beside]
    return {"include": include, "exclude": [{"class": best[2], "count": 1}]}


def test_a_score_is_the_same_in_any_company(folder, clip_folder):
    images = pictures(9, 24, 512)
    reward = load(folder, clip_folder=str(clip_folder))
    there = detect(folder, images)
    metadata = [asked_of(i, one) for i, one in enumerate(there)]
    together = reward.judge(images, ["a"] * 9, metadata)
    assert together.score.dtype == np.float32
    assert len(set(together.score.tolist())) > 3
    assert (reward.judge(images, ["a"] * 9, metadata).score == together.score).all()
    order = np.random.default_rng(0).permutation(9)
    shuffled = reward.judge(images[order], ["a"] * 9, [metadata[i] for i in order])
    assert (shuffled.score == together.score[order]).all()
    for i in (0, 3, 4, 8):
        assert reward.judge(images[i : i + 1], ["a"], metadata[i : i + 1]).score == together.score[i]
        (alone,) = detect(folder, images[i : i + 1])
        assert sorted(alone.classes) == sorted(there[i].classes)
        assert np.sort(alone.scores) == pytest.approx(np.sort(there[i].scores), abs=1e-4)


def test_the_score_is_1_exactly_where_it_passes(folder):
    images = pictures(6, 24, 512)
    there = detect(folder, images)
    names = sorted({name for one in there for name in one.names})
    metadata = [
        {"include": [{"class": names[i % len(names)], "count": 1}, {"class": one.names[0], "count": 1}]}
        for i, one in enumerate(there)
    ]
    judged = load(folder).judge(images, ["a"] * 6, metadata)
    expected = [(1 + (names[i % len(names)] in one.names)) / 2 for i, one in enumerate(there)]
    assert judged.score.tolist() == expected
    assert set(expected) == {0.5, 1}
    assert judged.passed.tolist() == [share == 1 for share in expected]
    assert judged.passed.dtype == bool


@torch.no_grad()
def color_by_transformers(folder, picture, name):
    """Zero-shot, as CLIP's authors do it: the mean of the sentences' directions stands for a colour."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    seen = model.get_image_features(**CLIPImageProcessorPil(**sizes)(picture, return_tensors="pt")).pooler_output[0]
    alike = []
    for color in COLORS:
        mean = torch.zeros_like(seen)
        for sentence in (
            f"a photo of a {color} {name}",
            f"a photo of a {color}-colored {name}",
            f"a photo of a {color} object",
        ):
            one = model.get_text_features(**tokenizer(sentence, return_tensors="pt")).pooler_output[0]
            mean += one / one.norm()
        alike.append(float(seen @ mean / mean.norm()))
    return COLORS[int(np.argmax(alike))]


def test_colors_are_those_of_zero_shot_clip(clip_folder):
    crops = [one for k in range(10) for one in pictures(1, 9 + 5 * k, 60 - 5 * k, seed=3 * k)]
    crops = [(crop * np.random.default_rng(k).random(3)).astype(np.uint8) for k, crop in enumerate(crops)]
    names = ["bench", "tv remote"] * 5
    said = Colors(Clip(Source("object_checks", HUB, HUB, str(clip_folder))))(crops, names)
    assert said == [color_by_transformers(clip_folder, *each) for each in zip(crops, names, strict=True)]
    assert len(set(said)) > 2


def test_one_color_of_the_ten_is_an_objects(folder, clip_folder):
    image = pictures(1, 24, 512, seed=5)
    (there,) = detect(folder, image)
    place = int(there.scores.argmax())
    entries = [{"class": there.names[place], "count": 1, "color": color} for color in COLORS]
    reward = load(folder, clip_folder=str(clip_folder))
    judged = reward.judge(image.repeat(10, 0), ["a"] * 10, [{"include": [entry]} for entry in entries])
    color = color_by_transformers(clip_folder, there.cut(image[0], place), there.names[place])
    assert judged.score.tolist() == [1 if one == color else 0.5 for one in COLORS]


def test_no_clip_is_read_until_a_color_is_asked_for(folder):
    reward = load(folder, clip_folder="none/such")
    image = pictures(1, 24, 512)
    name = detect(folder, image)[0].names[0]
    assert reward.judge(image, ["a"], [{"include": [{"class": name, "count": 1}]}]).score == 1
    with pytest.raises(ValueError, match=r"^reward: object_checks: clip_folder=none/such cannot be used: there is no"):
        reward.judge(image, ["a"], [{"include": [{"class": name, "count": 1, "color": "red"}]}])


def test_each_network_is_read_once(folder, clip_folder, tmp_path):
    folder, clip_folder = (shutil.copytree(one, tmp_path / one.name) for one in (folder, clip_folder))
    image = pictures(1, 24, 512)
    (there,) = detect(folder, image)
    asked = [{"include": [{"class": there.names[0], "count": 1, "color": "red"}]}]
    reward = load(folder, clip_folder=str(clip_folder))
    first = reward.judge(image, ["a"], asked).score
    shutil.rmtree(folder)
    shutil.rmtree(clip_folder)
    assert reward.judge(image, ["a"], asked).score == first


def test_no_pictures_have_no_scores(folder):
    judged = load(folder).judge(pictures(0), [], [])
    assert (judged.score.shape, judged.score.dtype, judged.passed.shape) == ((0,), np.float32, (0,))


OLD = {"torch_dtype": "float32", "is_encoder_decoder": False, "top_k": 50, "do_sample": False, "max_length": 20}


def as_the_hub_has_it(folder, copy):
    """As transformers of 2023 saved it: without a norm that nothing reads, but with tables of places."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    weights = load_file(copy / "model.safetensors")
    for name in [*weights]:
        if name.endswith("relative_position_bias_table"):
            weights[name.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.int64)
        if "swin.layernorm." in name:
            del weights[name]
    assert "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight" in weights
    save_file(weights, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    backbone = {**config["backbone_config"], **OLD, "path_norm": True, "architectures": ["SwinForImageClassification"]}
    (copy / "config.json").write_text(json.dumps({**config, **OLD, "backbone_config": backbone}))


def test_the_hubs_files_say_what_those_of_a_folder_say(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    as_the_hub_has_it(folder, tmp_path / "copy")
    on_the_hub(tmp_path, HUB, (tmp_path / "copy").iterdir())
    images = pictures(3, 24, 512)
    metadata = [{"include": [{"class": one.names[0], "count": 3}]} for one in detect(folder, images)]
    said = rewards.load("object_checks").judge(images, ["a"] * 3, metadata).score
    assert said.tolist() == load(folder).judge(images, ["a"] * 3, metadata).score.tolist()
    assert not caplog.records


def test_a_detector_that_the_hub_does_not_give(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"^reward: object_checks needs {HUB} of the Hub, which .*object_checks=FOLDER$"
    ):
        rewards.load("object_checks")


def weights_with(change):
    def changed(copy):
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors")

    return changed


def of_ten_classes(copy):
    config = json.loads((copy / "config.json").read_text())
    config["id2label"] = {str(i): str(i) for i in range(10)}
    (copy / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            weights_with(lambda weights: weights.pop("class_predictor.bias")),
            "do not fit: 1 of .* class_predictor.bias$",
        ),
        (weights_with(lambda weights: weights.update(more=torch.zeros(1))), "do not fit: 1 of .* the first more$"),
        (
            weights_with(lambda weights: weights.update({"class_predictor.weight": torch.zeros(81, 3)})),
            "do not fit: 1 of .* class_predictor.weight$",
        ),
        (of_ten_classes, "knows 10 classes, and COCO has 80$"),
        (lambda copy: (copy / "config.json").unlink(), "cannot be used: it has no config.json"),
        (lambda copy: (copy / "model.safetensors").unlink(), "as one .safetensors, and holds 0"),
    ],
)
def test_a_folder_that_will_not_do(change, message, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    with pytest.raises(ValueError, match=f"^reward: object_checks.*{message}") as raised:
        load(copy)
    assert "\n" not in str(raised.value)
