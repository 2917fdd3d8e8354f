"""The judge reads real shapes right, also through noise and blur, and reports planted errors."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from glide_ds.data import judge as judging
from glide_ds.data import shapes
from glide_ds.data.judge import grade, judge
from glide_ds.errors import DataError

PAIRS = [i for i in range(shapes.HELD_OUT, shapes.HELD_OUT + 70) if shapes.scene(i).relation]


def blur(image):
    """A 3 x 3 binomial filter: an edge of one pixel becomes two."""
    for axis in (0, 1):
        image = 0.25 * np.roll(image, 1, axis) + 0.5 * image + 0.25 * np.roll(image, -1, axis)
    return image


def disturb(image, kind, rng):
    if "blur" in kind:
        image = blur(image)
    if "noise" in kind:
        image = image + rng.normal(0, 12, image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def shares(count, size, kind):
    rng = np.random.default_rng(0)
    right = np.zeros(4)
    for index in range(shapes.HELD_OUT, shapes.HELD_OUT + count):
        scene = shapes.scene(index)
        result = grade(disturb(shapes.render(scene, size), kind, rng), shapes.caption(scene))
        right += (result.colour, result.shape, result.size, result.position)
    return right / count


@pytest.mark.parametrize(("size", "kind"), list(product((32, 64), ("clean", "noise", "blur"))))
def test_real_pictures_are_read_right(size, kind):
    # Measured over 2,000 pictures: 1.0 in all of these.
    assert shares(100, size, kind).min() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clean", "noise", "blur", "blur+noise"])
def test_two_thousand_held_out_pictures_are_read_right(kind):
    assert shares(2000, 32, kind).min() >= 0.98


def test_place_and_size_are_measured():
    for index in PAIRS[:30]:
        scene = shapes.scene(index)
        found = {f.colour: f for f in judge(shapes.render(scene, 32))}
        for shape in scene.shapes:
            seen = found[shape.label.colour]
            assert abs(seen.x - shape.x) < 0.01
            assert abs(seen.y - shape.y) < 0.01
            assert abs(seen.diameter - shape.diameter) < 0.025
            assert seen.overlap > 0.85


def with_label(scene, number, **change):
    shape = scene.shapes[number]
    changed = replace(shape, label=replace(shape.label, **change))
    return replace(scene, shapes=(*scene.shapes[:number], changed, *scene.shapes[number + 1 :]))


@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_colour_is_reported(number):
    for index in PAIRS:
        scene = shapes.scene(index)
        present = {s.label.colour for s in scene.shapes}
        for colour in set(shapes.COLOURS) - present:
            result = grade(shapes.render(with_label(scene, number, colour=colour), 32), shapes.caption(scene))
            assert result == judging.Grade(False, False, False, False)


@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_shape_is_reported_and_nothing_else(number):
    for index in PAIRS:
        scene = shapes.scene(index)
        for kind in set(shapes.KINDS) - {scene.shapes[number].label.kind}:
            result = grade(shapes.render(with_label(scene, number, kind=kind), 32), shapes.caption(scene))
            assert result == judging.Grade(colour=True, shape=False, size=True, position=True)


def test_a_wrong_size_is_reported():
    for index in PAIRS:
        scene = shapes.scene(index)
        told = shapes.describe(with_label(scene, 0, size="tiny"))
        assert grade(shapes.render(scene, 32), told) == judging.Grade(True, True, False, True)


def test_swapped_colours_and_swapped_places_are_reported():
    for index in PAIRS:
        scene = shapes.scene(index)
        a, b = scene.shapes
        moved = replace(scene, shapes=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))
        assert grade(shapes.render(moved, 32), shapes.caption(scene)).position is False
        colours = with_label(
            with_label(scene, 0, colour=b.label.colour, kind="ring"), 1, colour=a.label.colour, kind="square"
        )
        told = shapes.describe(with_label(with_label(scene, 0, kind="ring"), 1, kind="square"))
        result = grade(shapes.render(colours, 32), told)
        assert result.colour is True  # the right colours are there
        assert result.shape is False  # on the wrong objects


def test_a_relation_along_the_other_axis_does_not_count():
    for index in PAIRS:
        scene = shapes.scene(index)
        image = shapes.render(scene, 32)
        for relation in shapes.RELATIONS:
            told = replace(shapes.describe(scene), relation=relation)
            assert grade(image, told).position is (relation == scene.relation)


def test_an_object_too_many_or_too_few_is_reported():
    for index in PAIRS[:30]:
        scene = shapes.scene(index)
        alone = replace(scene, shapes=scene.shapes[:1])
        assert not grade(shapes.render(alone, 32), shapes.caption(scene)).colour
        assert not grade(shapes.render(scene, 32), str(scene.shapes[0].label)).colour


def test_two_objects_of_one_colour_are_both_checked():
    scene = next(shapes.scene(i) for i in PAIRS if shapes.scene(i).shapes[0].label.kind == "circle")
    same = with_label(with_label(scene, 1, colour=scene.shapes[0].label.colour, kind="square"), 0, size="small")
    told = shapes.describe(same)
    image = shapes.render(same, 64)
    assert (grade(image, told).colour, grade(image, told).shape) == (True, True)
    told_twice_the_circle = replace(told, objects=(told.objects[0], replace(told.objects[1], kind="circle")))
    assert grade(image, told_twice_the_circle).shape is False


def test_components_follow_bends_and_diagonals_but_no_gaps():
    drawing = ["#....#.", "#....#.", ".####..", "......#", "##.#..#"]
    # Squares only: two free rows below.
    mask = np.array([[c == "#" for c in row] for row in [*drawing, "." * 7, "." * 7]])
    parts = list(judging._components(mask))
    assert sorted(int(part.sum()) for part in parts) == [1, 2, 2, 8]
    assert np.array_equal(np.sum(parts, axis=0), mask)


def test_specks_are_dropped():
    image = shapes.render(shapes.Scene((), None, (240, 240, 240)), 32)
    image[5:8, 5:8] = (220, 30, 35)
    assert judge(image) == []
    image[5:9, 5:9] = (220, 30, 35)
    assert len(judge(image)) == 1


def test_a_foreign_colour_and_a_foreign_shape_are_unknown():
    image = np.full((64, 64, 3), 240, np.uint8)
    image[10:40, 10:40] = (240, 150, 190)  # pink
    image[50:54, 4:60] = (35, 85, 220)  # a blue bar
    square, bar = sorted(judge(image), key=lambda f: f.y)
    assert (square.colour, square.kind) == (None, "square")
    assert (bar.colour, bar.kind) == ("blue", None)


@pytest.mark.parametrize("seed", range(3))
def test_pure_noise_is_not_a_shape(seed):
    image = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert not grade(image, "a large red circle").shape


@pytest.mark.parametrize("shape", [(32, 31, 3), (32, 32), (32, 32, 4)])
def test_a_wrong_array_is_an_error_that_names_its_shape(shape):
    with pytest.raises(DataError, match=str(list(shape)).replace("[", r"\[")):
        judge(np.zeros(shape, np.uint8))
