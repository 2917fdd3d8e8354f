"""Many pictures into a folder: what files hold, started again, over several processes, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import glide_ds
from glide_ds.cli import main
from glide_ds.commands.drawing import many as drawing
from glide_ds.commands.drawing.drawer import Drawer, load
from glide_ds.commands.drawing.many import KEYWORD
from glide_ds.data import shapes
from glide_ds.errors import ConfigError, DataError
from glide_ds.files import sha256
from glide_ds.inference.requests import read_requests
from glide_ds.model.clip import FrozenClip

TINY = "builtin:tiny"


def many(folder: Path, *options: object, source: object = TINY) -> int:
    words = ["sample", source, "--steps", 2, "--guidance", 1, "--out_dir", folder, *options]
    return main([str(word) for word in words])


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue square\n  \na green ring\n")
    return path


@pytest.fixture(scope="module")
def drawer() -> Drawer:
    return load(TINY, device="cpu")


def test_a_file_for_each_picture_says_how_it_was_drawn(
    tmp_path: Path, prompts: Path, drawer: Drawer, capsys: pytest.CaptureFixture[str]
):
    assert many(tmp_path / "out", "--prompts", prompts, "--n", 2, "--seed", 5) == 0
    assert "2 empty lines left out" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [(line["file"], line["prompt"], line["seed"]) for line in lines] == [
        ("000001-00.png", "a red circle", 5),
        ("000001-01.png", "a red circle", 6),
        ("000003-00.png", "a blue square", 7),
        ("000003-01.png", "a blue square", 8),
        ("000005-00.png", "a green ring", 9),
        ("000005-01.png", "a green ring", 10),
    ]
    with Image.open(tmp_path / "out" / "000003-01.png") as picture:
        said = json.loads(picture.info[KEYWORD])
        pixels = np.asarray(picture)
    assert {"file": "000003-01.png"} | said == lines[3]
    (again,) = drawer(said["prompt"], steps=said["steps"], guidance=said["guidance"], seed=said["seed"])
    assert np.abs(np.asarray(again).astype(int) - pixels).max() <= 1  # another batch, other roundings


def test_a_line_of_a_jsonl_has_its_own_seed_and_guidance(tmp_path: Path):
    rows: list[dict[str, object]] = [
        {"prompt": "a red circle", "seed": 7, "guidance": 3},
        {"prompt": "a red circle"},
        {"prompt": "a red circle", "seed": 7, "guidance": 3.0},
        {"prompt": "a red circle", "seed": 7},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert many(tmp_path / "out", "--prompts", tmp_path / "p.jsonl") == 0
    first, second, third, fourth = (np.asarray(Image.open(p)) for p in sorted((tmp_path / "out").glob("*.png")))
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, fourth)


def test_what_is_there_is_not_drawn_again_and_what_is_missing_is(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert many(out, "--prompts", prompts, "--batch", 1) == 0
    whole, times = files(out), {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "000003.png").unlink()
    (out / "index.jsonl").unlink()
    assert many(out, "--prompts", prompts, "--batch", 1) == 0
    assert "1 pictures to draw, 2 are there" in capsys.readouterr().out
    assert files(out) == whole
    assert {name: (out / name).stat().st_mtime_ns == time for name, time in times.items()} == {
        "000001.png": True,
        "000003.png": False,
        "000005.png": True,
    }


@pytest.mark.parametrize(
    ("options", "part"), [(["--seed", 1], "another seed (0, now 1)"), (["--batch", 2], "another batch")]
)
def test_a_folder_of_other_drawings_is_refused(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], options: list[object], part: str
):
    assert many(tmp_path / "out", "--prompts", prompts) == 0
    before = files(tmp_path / "out")
    assert many(tmp_path / "out", "--prompts", prompts, *options) == 2
    assert part in capsys.readouterr().err
    prompts.write_text("something else")
    assert many(tmp_path / "out", "--prompts", prompts) == 2
    assert "another requests" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_a_folder_of_foreign_pictures_is_left_alone(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "000001.png").write_bytes(b"mine")
    assert many(tmp_path, "--prompts", prompts) == 2
    assert "holds 000001.png and no drawing.json" in capsys.readouterr().err
    assert (tmp_path / "000001.png").read_bytes() == b"mine"


def start(folder: Path, prompts: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    words = [
        "sample",
        TINY,
        "--steps",
        "2",
        "--guidance",
        "1",
        "--batch",
        "3",
        "--n",
        "2",
        "--sampler",
        "euler-a",
    ]
    words += ["--prompts", str(prompts), "--out_dir", str(folder)]
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "glide_ds", *words], env=os.environ | ranks)


@pytest.mark.slow
def test_killed_and_started_again_on_two_processes_equals_one_uninterrupted(tmp_path: Path):
    """SIGKILL both in the middle, start both again: the same files as of one process, index and all."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(shapes.draw(i, 16)[1] for i in range(60)))
    assert start(tmp_path / "one", prompts, 0, 1).wait() == 0
    two = tmp_path / "two"
    running = [start(two, prompts, rank, 2) for rank in range(2)]
    while len(list(two.glob("*.png"))) < 12:
        assert all(process.poll() is None for process in running)
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 12 <= len(list(two.glob("*.png"))) < 120
    assert not (two / "index.jsonl").exists()
    running = [start(two, prompts, rank, 2) for rank in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert files(two) == files(tmp_path / "one")
    assert len(files(two)) == 122


def test_the_ranks_share_the_pictures_and_the_last_writes_the_index(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert many(tmp_path / "one", "--prompts", prompts, "--batch", 1) == 0
    for rank, files_then in ((1, 1), (0, 3)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert many(tmp_path / "two", "--prompts", prompts, "--batch", 1) == 0
        assert len(list((tmp_path / "two").glob("*.png"))) == files_then
        assert (tmp_path / "two" / "index.jsonl").exists() == (rank == 0)
    assert "2 pictures are other ranks' and not there yet" in capsys.readouterr().out
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert main(["sample", TINY, "--prompt", "x", "--out", str(tmp_path / "x.png")]) == 2


def test_a_write_that_fails_leaves_whole_pictures(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(path: Path, data: bytes | str) -> None:
        if path.name.startswith("000003"):
            raise OSError(28, "No space left on device", str(path))
        whole(path, data)

    whole = drawing.write_file
    monkeypatch.setattr(drawing, "write_file", full)
    assert many(tmp_path / "out", "--prompts", prompts) == 75
    assert "No space left" in capsys.readouterr().err
    assert sorted(files(tmp_path / "out")) == ["000001.png", "drawing.json"]
    monkeypatch.setattr(drawing, "write_file", whole)
    assert many(tmp_path / "out", "--prompts", prompts) == 0
    assert len(files(tmp_path / "out")) == 5


BAD_LINES = [
    ("not json", r"line 2: no JSON"),
    ('"a string"', r"line 2: the line is 'a string'"),
    ('{"prompt": 5}', r"line 2: prompt is 5"),
    ('{"prompt": "x", "sed": 3}', r"line 2: the key 'sed' does not exist; choose of prompt, image"),
    ('{"prompt": "x", "seed": -1}', r"line 2: seed is -1"),
    ('{"prompt": "x", "seed": 1.5}', r"line 2: seed is 1.5"),
    ('{"prompt": "x", "guidance": NaN}', r"line 2: guidance is nan"),
    ('{"prompt": "x", "guidance": "much"}', r"line 2: guidance is 'much'"),
    ('{"prompt": "  "}', r"line 2: no prompt, image or clip_prompt"),
    ('{"image": "missing.png"}', r"line 2: the image prompt .*missing.png can't be read"),
    ('{"image": "bad.png"}', r"line 2: the image prompt .*bad.png is no picture"),
    ('{"image": ["good.png:1", "good.png"]}', r"line 2: 1 weights are given for 2"),
]


@pytest.mark.parametrize(("line", "part"), BAD_LINES)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: str, part: str):
    Image.fromarray(shapes.draw(0, 16)[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=part):
        read_requests(tmp_path / "p.jsonl")


def test_all_bad_lines_are_told_at_once_but_no_thousands(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text("{}\n" * 30)
    with pytest.raises(DataError) as caught:
        read_requests(tmp_path / "p.jsonl")
    assert len(caught.value.faults) == 21
    assert "line 20: " in str(caught.value)
    assert "and 10 more mistakes" in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_a_prompt_is_refused(tmp_path: Path, text: str):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(DataError, match="holds no prompt"):
        read_requests(tmp_path / "p.txt")
    with pytest.raises(DataError, match=r"none.txt can't be read"):
        read_requests(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prompts", "FILE", "--prompt", "x"], "--prompts and --prompt don't go together"),
        (["--prompt", "x", "--rerank", 3, "--n", 2], "--rerank 3 of --n 2"),
        (["--prompt", "x", "--rerank", 1], "has no CLIP adapter"),
        (["--prompt", "x", "--clip", "both"], "--out_dir and --clip both"),
        (["--prompt", "x", "--eta", 0.5], "eta=0.5 has no effect on sampler 'dpm++2m'"),
        (
            ["--prompt", "x", "--sampler", "plms", "--steps", 20, "--spacing", "karras"],
            "'plms' was given steps of",
        ),
        (["--prompt", "x", "--steps", 2000], "cannot give 2000"),
        (["--prompt", "x", "--guidance_rescale", 0.5], "guidance_rescale without guidance"),
        (["--prompt", "x", "--guidance", 3, "--guidance_interval", 5, 1], "guidance_interval is 5 to 1"),
        ([], "there is nothing to draw"),
        (["--clip_mix", "compose", "--image", "a.png"], "fewer than two CLIP prompts"),
        (["--clip_mix", "compose", "--prompts", "FILE"], "fewer than two CLIP prompts"),
        (
            ["--clip_mix", "compose", "--clip_prompt", "a", "b", "--prompt", "c"],
            "compose and --prompt don't go",
        ),
        (
            ["--clip_mix", "compose", "--clip_prompt", "a", "b", "--clip_guidance", 2],
            "compose and --clip_guidance",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], options: list[object], part: str
):
    words = [prompts if word == "FILE" else word for word in options]
    assert many(tmp_path / "out", *words) == 2
    assert part in capsys.readouterr().err
    assert list(tmp_path.glob("out/*")) == []


def test_a_tasks_pictures_are_the_same_in_any_world(drawer: Drawer):
    """Prompts of one guidance together, whole prompts, at most `batch` pictures unless one prompt has more."""
    requests = [drawing.Request(line, "x", guidance=1.0 + line % 2) for line in range(1, 8)]
    settings = drawing.Settings("m", None, 2, 2, None, 0, 5, 2, "ddim", "uniform", 1.0, {}, False)
    assert drawing.tasks_of(requests, settings) == [[0, 2], [4, 6], [1, 3], [5]]


def test_the_package_draws_and_stays_light(drawer: Drawer):
    code = (
        "import sys, glide_ds; glide_ds.load; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    model = glide_ds.load(TINY, device="cpu")
    options = {"steps": 2, "guidance": 1.0}
    pictures = model("a red circle", n=3, seed=4, batch=2, **options)
    assert [(p.size, p.mode) for p in pictures] == [((32, 32), "RGB")] * 3
    for seed, picture in enumerate(pictures, 4):
        alone = np.asarray(model("a red circle", seed=seed, **options)[0]).astype(int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1
    assert not np.array_equal(pictures[0], pictures[1])
    for wrong, part in (
        ({}, "nothing to draw"),
        ({"prompt": "x", "n": 0}, "n is 0"),
        ({"image": "x"}, "without a CLIP adapter"),
    ):
        with pytest.raises(ConfigError, match=part):
            model(**wrong)  # type: ignore[arg-type]


def test_bf16_draws_nearly_the_same(drawer: Drawer):
    half = load(TINY, device="cpu", bf16=True)
    whole, rough, other = (
        np.asarray(model("a red circle", steps=4, guidance=1.0, seed=seed)[0]).astype(int)
        for model, seed in ((drawer, 0), (half, 0), (drawer, 1))
    )
    assert 0 < np.abs(whole - rough).mean() < np.abs(whole - other).mean() / 2


@pytest.mark.slow
def test_compiled_draws_the_same(drawer: Drawer):
    compiled = load(TINY, device="cpu", compiled=True)
    whole, other = (np.asarray(m("a red circle", steps=2)[0]).astype(int) for m in (drawer, compiled))
    assert np.abs(whole - other).max() <= 1


def test_memory_is_a_tasks_own(tmp_path: Path, drawer: Drawer, monkeypatch: pytest.MonkeyPatch):
    """Nothing of a task is held when the next one is drawn."""
    alive: list[int] = []
    real = Drawer.draw_small

    def counted(self: Drawer, captions: list[str], *args: object, **options: object) -> torch.Tensor:
        alive.append(sum(kept() is not None for kept in handed))
        images = real(self, captions, *args, **options)  # type: ignore[arg-type]
        handed.append(weakref.ref(images))
        return images

    handed: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(Drawer, "draw_small", counted)
    (tmp_path / "p.txt").write_text("x\n" * 6)
    assert many(tmp_path / "out", "--prompts", tmp_path / "p.txt", "--batch", 1) == 0
    assert len(alive) == 6
    assert max(alive) <= 1


def test_the_best_by_clip_are_kept_best_first(tmp_path: Path, prompts: Path):
    """The same pictures as without ranking, of which those that stay are the likest by the encoder named."""
    options = ("--prompts", prompts, "--n", 4, "--batch", 8)
    assert many(tmp_path / "all", *options) == 0
    assert many(tmp_path / "best", *options, "--rerank", 2, "--rerank_by", TINY) == 0
    lines = [json.loads(line) for line in (tmp_path / "best" / "index.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    clip = FrozenClip(TINY)
    pixels = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "all").glob("*.png"))]
    seen = clip.encode_image(torch.from_numpy(np.stack(pixels))).view(3, 4, -1)
    asked = clip.encode_text([line["prompt"] for line in lines[::2]])
    likeness = torch.einsum("pnd,pd->pn", seen, asked)
    scores, places = likeness.sort(descending=True)
    assert [line["score"] for line in lines] == pytest.approx(scores[:, :2].flatten().tolist(), abs=1e-3)
    assert [line["seed"] for line in lines] == [
        prompt * 4 + place for prompt in range(3) for place in places[prompt, :2].tolist()
    ]


def test_prompts_that_are_cut_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "p.txt").write_text(f"{'a red circle ' * 80}\n" * 3)
    assert many(tmp_path / "out", "--prompts", tmp_path / "p.txt") == 0
    told = capsys.readouterr().out
    assert told.count("cut off") == 1
    assert "so it is with 2 more prompts" in told
