"""Scenes are functions of (seed, index), look the same at every size, and their captions are true and held out."""

import collections
import itertools
import re

import numpy as np
import pytest

from fid_imagegen.data import pipeline, shapes
from fid_imagegen.data.captions import texts
from fid_imagegen.data.shapes import COLOURS, HELD_OUT, POSITIONS, RELATIONS, SHAPES, SIZES, TRAINING
from fid_imagegen.data.sources import make_source

SCENES = [shapes.scene(0, i) for i in range(1500)]


def test_a_scene_is_a_function_of_seed_and_index():
    assert SCENES[7] == shapes.scene(0, 7) and len(set(SCENES)) == len(SCENES)
    assert all(shapes.scene(1, i) != SCENES[i] for i in range(50))


def test_golden():
    # Raw Philox bits: these lines change only if the data set does, and then its fingerprint must too.
    assert [scene.caption for scene in SCENES[:3]] == GOLDEN
    assert [scene.caption for scene in shapes.held_out_prompts(3)] == GOLDEN_PROMPTS


def test_combinations_are_halved_and_only_the_combination_is_new():
    every = set(itertools.product(COLOURS, SHAPES, POSITIONS))
    assert set(TRAINING) | set(HELD_OUT) == every and len(TRAINING) == len(HELD_OUT) == 216
    for kept in itertools.combinations(range(3), 2):
        for half in (TRAINING, HELD_OUT):
            seen = collections.Counter(tuple(combination[i] for i in kept) for combination in half)
            assert len(seen) == len({tuple(combination[i] for i in kept) for combination in every})
            assert min(seen.values()) >= 2


def test_no_training_scene_shows_a_held_out_combination():
    alone = [scene.things[0] for scene in SCENES if len(scene.things) == 1]
    shown = {(thing.colour, thing.shape, thing.position) for thing in alone}
    assert not shown & set(HELD_OUT) and len(shown) > 200 and 0.7 < len(alone) / len(SCENES) < 0.8


def test_held_out_prompts_are_distinct_combinations_and_begin_with_the_same():
    prompts = shapes.held_out_prompts(216)
    assert {(p.things[0].colour, p.things[0].shape, p.things[0].position) for p in prompts} == set(HELD_OUT)
    assert shapes.held_out_prompts(20) == prompts[:20]
    assert len({p.things[0].colour for p in prompts[:30]}) == 8  # mixed
    assert not {p.caption for p in prompts} & {scene.caption for scene in SCENES}
    for count in (0, 217):
        with pytest.raises(ValueError, match=rf"found count={count}, expected 1 to 216"):
            shapes.held_out_prompts(count)


def test_captions_name_what_is_there_and_nothing_else():
    nouns = re.compile(rf"(an?) (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
    for scene in SCENES:
        found = nouns.findall(scene.caption)
        asked = scene.things
        if "with" in scene.caption:
            asked = asked[::-1]
        assert [(colour, shape) for _, _, colour, shape in found] == [(thing.colour, thing.shape) for thing in asked]
        for (article, size, colour, _), thing in zip(found, asked, strict=True):
            assert size in ("", thing.size)
            assert article == ("an" if (size or colour)[0] in "aeiou" else "a")
        if scene.relation:
            assert f" {scene.relation} " in scene.caption and not any(thing.position for thing in scene.things)
        else:
            assert re.search(rf"(in|at) the {asked[0].position}(,| ?$)", scene.caption)
    templates = {nouns.sub("X", scene.caption) for scene in SCENES}
    assert len(templates) == 4 * (len(POSITIONS) + len(RELATIONS))


def test_places_and_relations_are_true():
    for scene in SCENES:
        for thing in scene.things:
            reach = 1.15 * SIZES[thing.size]
            assert reach < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        if scene.relation:
            first, second = scene.things
            offset = np.array([first.x - second.x, first.y - second.y])
            along = offset @ RELATIONS[scene.relation]
            assert along > 0.4 and abs(offset).sum() - along < 0.2  # along the relation, hardly across
            assert first.colour != second.colour
        else:
            (thing,) = scene.things
            assert POSITIONS[thing.position] == pytest.approx((thing.x, thing.y), abs=0.03)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [9, 40])
def test_coverage_is_that_of_many_points_per_pixel(shape, size):
    fine, x, y, radius = 720 // size, 0.47, 0.55, 0.2
    centres = (np.arange(fine * size) + 0.5) / (fine * size)
    inside = SHAPES[shape](*np.meshgrid((centres - x) / radius, (centres - y) / radius)) <= 0
    expected = inside.reshape(size, fine, size, fine).mean((1, 3))
    found = shapes.coverage(shape, x, y, radius, size)
    assert 0.02 < expected.mean() < 0.2
    assert (
        np.abs(found - expected).max() < 0.3 and np.abs(found - expected).mean() < 0.06 / size
    )  # the most at sharp tips
    # Centroids are the centres: templates are aligned by them.
    for axis, middle in ((0, x), (1, y)):
        centroid = inside.sum(axis) @ centres / inside.sum()
        assert centroid == pytest.approx(middle, abs=1e-3)


@pytest.mark.parametrize("size", [7, 64, 100])
def test_every_size_shows_the_same_picture(size):
    for scene in SCENES[:20]:
        large = shapes.render(scene, 4 * size).astype(float).reshape(size, 4, size, 4, 3).mean((1, 3))
        small = shapes.render(scene, size)
        assert small.dtype == np.uint8 and small.shape == (size, size, 3)
        assert np.abs(large - small).mean() < 0.5 and np.abs(large - small).max() < 90  # one grey level in 255 is 0.4 %


def test_outlines_are_smooth():
    image = shapes.render(SCENES[0], 64)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_source(config):
    made = config(source="shapes", image_size=16, channels=3)
    source = make_source(made)
    record = source[11]
    np.testing.assert_array_equal(record["image"], shapes.render(SCENES[11], 16))
    assert record["captions"] == source.captions(11) == (SCENES[11].caption,)
    assert record["label"] == 0 and source.num_classes == 0 and len(source) == 2**15
    assert list(itertools.islice(texts(source), 30)) == [scene.caption for scene in SCENES[:30]]
    assert source.fingerprint == make_source(made).fingerprint
    assert source.fingerprint != make_source(config(source="shapes", image_size=17, channels=3)).fingerprint
    for index in (-1, 2**15):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("change", [{"channels": 1}, {"flip": True}])
def test_grey_and_mirrored_scenes_are_refused(config, change):
    with pytest.raises(ValueError, match=r"found channels=., flip=.* for source 'shapes', expected 3 and False"):
        make_source(config(**{"source": "shapes", "channels": 3, **change}))


def test_batches_hold_captions_of_their_pictures(config):
    made = config(source="shapes", channels=3, holdout_every=10)
    source = make_source(made)
    iterator = pipeline.batches(source, made, seed=0, batch_size=12)
    batch = next(iterator)
    iterator.close()
    assert batch["caption"].shape == (12,) and batch["caption"].dtype == object
    for image, caption, index in zip(batch["image"], batch["caption"], batch["index"].tolist(), strict=True):
        np.testing.assert_array_equal(image, source[index]["image"])
        assert caption == source.captions(index)[0] == source[index]["captions"][0]


GOLDEN = [
    "a picture of a small yellow star at the top right",
    "a black circle at the top left",
    "a medium cyan circle at the top right",
]
GOLDEN_PROMPTS = [
    "there is an orange ring at the right",
    "there is a small green star in the centre",
    "there is a cyan triangle at the left",
]
