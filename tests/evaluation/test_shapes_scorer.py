"""The judge is right about true pictures, also soft and noisy ones, and guesses nothing from shuffled prompts."""

import numpy as np
import pytest
from scipy import ndimage

from fid_imagegen.data.shapes import COLOURS, HELD_OUT, SIZES, Scene, Thing, held_out_prompts, render, scene
from fid_imagegen.evaluation.shapes import find, judge, score

SCENES = [scene(0, i) for i in range(100)] + held_out_prompts(len(HELD_OUT))
ALONE = [asked for asked in SCENES if not asked.relation]


def pictures(scenes, size=64):
    return np.stack([render(asked, size) for asked in scenes])


@pytest.mark.parametrize("size", [32, 64])
def test_true_pictures(size):
    assert min(score(pictures(SCENES, size), SCENES).values()) >= 0.99


@pytest.mark.parametrize(("blur", "noise"), [(1.0, 0), (0, 20), (0.8, 12)])
def test_soft_and_noisy_pictures(blur, noise):
    scenes = SCENES[50:200]  # of both kinds
    images = ndimage.gaussian_filter(pictures(scenes).astype(float), (0, blur, blur, 0))
    images += noise * np.random.default_rng(0).normal(size=images.shape)
    images = np.clip(np.round(images), 0, 255).astype(np.uint8)
    assert min(score(images, scenes).values()) >= 0.99


def test_shuffled_prompts_are_met_by_chance():
    order = np.random.default_rng(0).permutation(len(ALONE))
    found = score(pictures(ALONE), [ALONE[i] for i in order])
    assert found["colour"] == pytest.approx(1 / 8, abs=0.05)
    assert found["shape"] == pytest.approx(1 / 6, abs=0.05)
    assert found["position"] == pytest.approx(1 / 9, abs=0.05)
    assert found["all"] < 0.02


@pytest.mark.parametrize(("attribute", "other"), [("colour", "cyan"), ("shape", "ring"), ("position", "bottom left")])
def test_one_wrong_attribute_is_the_one_reported(attribute, other):
    made = {"colour": "red", "shape": "star", "position": "top", "size": "medium"}
    x, y = 0.5, 0.27
    image = render(Scene((Thing(**made, x=x, y=y),), "", ""), 64)
    verdict = judge(image, Scene((Thing(**made | {attribute: other}, x=x, y=y),), "", ""))
    assert verdict == {key: key not in (attribute, "all") for key in ("colour", "shape", "position", "all")}


def pair(relation, first="red", second="blue", **changes):
    things = {first: ("star", 0.26, 0.5), second: ("circle", 0.74, 0.5)}
    made = tuple(Thing(colour, shape, "", "medium", x, y) for colour, (shape, x, y) in things.items())
    return Scene(made, relation, "")


def test_two_things():
    image = render(pair("left of"), 64)
    assert all(judge(image, pair("left of")).values())
    for relation in ("right of", "above", "below"):
        verdict = judge(image, pair(relation))
        assert verdict["colour"] and verdict["shape"] and not verdict["position"] and not verdict["all"]
    # The colours belong to their things.
    assert not judge(image, pair("left of", "blue", "red"))["all"]
    assert not judge(image, pair("left of", "red", "green"))["colour"]


def test_missing_and_additional_things():
    asked = Scene((Thing("red", "star", "left", "large", 0.26, 0.5),), "", "")
    more = Scene((*asked.things, Thing("blue", "ring", "right", "small", 0.74, 0.5)), "", "")
    assert judge(render(more, 64), asked) == {"colour": True, "shape": True, "position": True, "all": False}
    blank = np.full((64, 64, 3), 240, np.uint8)
    assert find(blank) == [] and not any(judge(blank, asked).values())
    assert not any(judge(render(asked, 64), pair("left of")).values())
    speck = render(asked, 64)
    speck[60:62, 60:62] = 0
    assert all(judge(speck, asked).values())


def test_find_measures_place_and_colour():
    for colour in COLOURS:
        for size in SIZES:
            thing = Thing(colour, "cross", "right", size, 0.71, 0.48)
            (found,) = find(render(Scene((thing,), "", ""), 64))
            assert (found.colour, found.shape) == (colour, "cross")
            assert (found.x, found.y) == pytest.approx((0.71, 0.48), abs=0.004)
