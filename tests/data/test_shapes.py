"""The built-in shapes: pure, well placed, truly captioned, the same at every size and as shards."""

import hashlib
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from glide_ds.data import shapes
from glide_ds.errors import DataError

SAMPLE = range(1500)


def test_stream_is_pinned():
    # A change here changes every picture of every earlier run: the built-in weights were trained on these.
    picture, text = shapes.draw(3, 32)
    assert text == "a small green triangle above a large blue ring"
    assert hashlib.sha256(picture.tobytes()).hexdigest().startswith("99539394f7ef5b14")


def test_draw_is_pure_and_depends_on_seed_and_index():
    first, again = shapes.draw(3), shapes.draw(3)
    assert first[1] == again[1]
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], shapes.draw(3, seed=1)[0])
    assert not np.array_equal(first[0], shapes.draw(3 + shapes.HELD_OUT)[0])
    assert first[0].dtype == np.uint8
    assert first[0].shape == (32, 32, 3)


def test_every_word_is_used_evenly():
    scenes = [shapes.scene(i) for i in SAMPLE]
    pairs = Counter(s.relation is not None for s in scenes)
    assert 0.45 < pairs[True] / len(scenes) < 0.55
    labels = [shape.label for s in scenes for shape in s.shapes]
    for field, names in (("colour", shapes.COLOURS), ("kind", shapes.KINDS), ("size", shapes.SIZES)):
        shares = Counter(getattr(label, field) for label in labels)
        assert set(shares) == set(names)
        assert min(shares.values()) > 0.8 * len(labels) / len(names)
    relations = Counter(s.relation for s in scenes if s.relation)
    assert set(relations) == set(shapes.RELATIONS)
    assert min(relations.values()) > 0.15 * pairs[True]


def test_objects_stay_inside_apart_and_in_relation():
    for index in SAMPLE:
        scene = shapes.scene(index)
        for shape in scene.shapes:
            low, high = shapes.SIZES[shape.label.size]
            assert low <= shape.diameter <= high
            room = shapes.MARGIN + shape.diameter / 2 - 1e-9
            assert room <= min(shape.x, shape.y)
            assert max(shape.x, shape.y) <= 1 - room
        if scene.relation:
            a, b = scene.shapes
            assert a.label.colour != b.label.colour
            dx, dy = shapes.RELATIONS[scene.relation]
            along = (a.x - b.x) * dx + (a.y - b.y) * dy
            across = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
            assert along >= (a.diameter + b.diameter) / 2 + shapes.GAP - 1e-9
            assert across <= shapes.MAX_SLANT * along + 1e-9


def test_caption_parses_back():
    for index in SAMPLE[:300]:
        scene = shapes.scene(index)
        assert shapes.parse_caption(shapes.caption(scene)) == shapes.describe(scene)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a corgi",
        "a large red circle above",
        "a large pink circle",
        "a red circle",
        "a large red circle near",
    ],
)
def test_foreign_caption_is_an_error_that_quotes_it(text):
    with pytest.raises(DataError, match="not one of the built-in shapes") as error:
        shapes.parse_caption(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_coverage_is_the_shape_area(kind):
    # Half the box's side 10.3 px, centre off the grid; areas in closed form.
    r = 10.3
    offset = np.arange(-16, 16, dtype=np.float32) + 0.17
    area = {
        "circle": np.pi * r**2,
        "square": 4 * r**2,
        "triangle": 2 * r**2,
        "cross": 4 * r**2 * (2 * shapes.CROSS_ARM - shapes.CROSS_ARM**2),
        "ring": np.pi * r**2 * (1 - shapes.RING_HOLE**2),
    }[kind]
    cover = shapes.coverage(kind, offset, offset, r)
    assert cover.min() >= 0
    assert cover.max() <= 1 + 1e-6
    assert cover.sum() == pytest.approx(area, rel=0.01)


def test_unknown_shape_is_an_error():
    with pytest.raises(DataError, match="star"):
        shapes.coverage("star", np.zeros(2, np.float32), np.zeros(2, np.float32), 1.0)


@pytest.mark.parametrize("size", [64, 256])
def test_larger_pictures_show_the_same_scene(size):
    for index in range(20):
        small, large = shapes.draw(index, 32)[0], shapes.draw(index, size)[0]
        block = size // 32
        reduced = large.reshape(32, block, 32, block, 3).mean((1, 3))
        difference = np.abs(reduced - small)
        assert difference.mean() < 1.0
        assert difference.max() < 45  # an edge pixel's coverage differs by a fifth at most


def test_background_is_light_and_objects_have_their_colour():
    for index in SAMPLE[:200]:
        scene = shapes.scene(index)
        picture = shapes.render(scene, 64)
        assert tuple(picture[0, 0]) == scene.background
        assert min(scene.background) >= 225
        for shape in scene.shapes:
            if shape.label.kind != "ring":
                assert tuple(picture[int(shape.y * 64), int(shape.x * 64)]) == shape.rgb


def test_shards_hold_the_drawn_samples_and_repeat_byte_for_byte(tmp_path):
    paths = shapes.write_shards(tmp_path / "a", 25, per_shard=10, size=48, seed=5)
    assert [p.name for p in paths] == ["shapes-000000.tar", "shapes-000001.tar", "shapes-000002.tar"]
    again = shapes.write_shards(tmp_path / "b", 25, per_shard=10, size=48, seed=5)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [p.name for p in paths]
    seen = 0
    for path in paths:
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}
            assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in tar.getmembers()} == {(0, 0, "", "", 0)}
        for key in sorted({name.split(".")[0] for name in files}):
            picture, text = shapes.draw(int(key), 48, seed=5)
            assert files[f"{key}.txt"].decode() == text
            assert json.loads(files[f"{key}.json"])["caption"] == text
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(files[f"{key}.png"]))), picture)
            seen += 1
    assert seen == 25


def test_an_interrupted_shard_is_not_left_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk")

    monkeypatch.setattr(shapes, "_members", fail)
    with pytest.raises(RuntimeError, match="disk"):
        shapes.write_shards(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_no_samples_is_an_error(tmp_path):
    with pytest.raises(DataError, match="count=0"):
        shapes.write_shards(tmp_path, 0)
