"""Mistakes that people make, as a table: each is answered by what is the case and what to do, with code 2, at once.

In this process, so that a row costs milliseconds; nothing of a row's folder may change but by what it says.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from train_kit import without_launcher, write_config

from glide_ds import cli
from glide_ds.config import load_configs
from glide_ds.data import open_shards

TINY = "ds_configs/tiny/phase1.json"
TRAIN = f"train --dry_run --ds_config {TINY} --set run.dir=DIR/run"
# A command line, DIR being a folder of its own, and what the answer has to hold: its fact, its remedy.
MISTAKES: list[tuple[str, str, str]] = [
    # keys
    (f"{TRAIN} lr=1e-4", "unknown key 'lr'", r"write optimizer\.params\.lr="),
    (f"{TRAIN} learning_rate=1e-4", "unknown key", r"write optimizer\.params\.lr="),
    (f"{TRAIN} train.lr=1e-4", r"unknown key 'train\.lr'", r"write optimizer\.params\.lr="),
    (f"{TRAIN} train.learning_rate=1e-4", "unknown key", r"write optimizer\.params\.lr="),
    (f"{TRAIN} optimizer.lr=1e-4", "unknown key", r"write optimizer\.params\.lr="),
    (f"{TRAIN} optimizer.weight_decay=0", "unknown key", r"write optimizer\.params\.weight_decay="),
    (f"{TRAIN} batch_size=8", "unknown key", r"write train_batch_size="),
    (f"{TRAIN} train.batch_size=8", "unknown key", r"write train_batch_size="),
    (f"{TRAIN} train.epochs=3", "unknown key", r"write train\.steps=.*epochs x pictures"),
    (f"{TRAIN} epochs=3", "unknown key", r"write train\.steps="),
    (f"{TRAIN} steps=3", "unknown key", r"write train\.steps="),
    (f"{TRAIN} warmup_steps=3", "unknown key", r"write scheduler\.params\.warmup_num_steps="),
    (f"{TRAIN} data.path=x", "unknown key", r"write data\.shards="),
    (f"{TRAIN} output_dir=x", "unknown key", r"write run\.dir="),
    (f"{TRAIN} gpus=2", "unknown key", r"deepspeed --num_gpus"),
    (f"{TRAIN} num_workers=2", "unknown key", r"write data\.workers="),
    (f"{TRAIN} seed=2", "unknown key", r"write train\.seed="),
    (f"{TRAIN} train.stepz=2", "unknown key", "nearest known: 'steps'"),
    (f"{TRAIN} trian.steps=2", "unknown key 'trian'", "nearest known: 'train'"),
    # values
    (f"{TRAIN} train.steps=many", r"train\.steps", "int"),
    (f"{TRAIN} train.steps=-3", r"train\.steps = -3", "at least"),
    (f"{TRAIN} train.steps", "train.steps", "="),
    (f"{TRAIN} train.phase=fuul", r"train\.phase", "full"),
    (f"{TRAIN} optimizer.type=Adamw", r"optimizer\.type", "AdamW"),
    (f"{TRAIN} optimizer.params.lr=auto", "auto", "give a value"),
    (f"{TRAIN} fp16.enabled=true", "fp16", "bf16"),
    (f"{TRAIN} zero_optimization.stage=3", r"zero_optimization\.stage = 3", "2"),
    (f"{TRAIN} checkpoint.keep=-1", r"checkpoint\.keep = -1", "at least 0"),
    (f"{TRAIN} log.every=0", r"log\.every = 0", "at least 1"),
    (f"{TRAIN} data.workers=-1", r"data\.workers = -1", "at least 0"),
    (f"{TRAIN} run.max_hours=-2", r"run\.max_hours = -2", "at least 0"),
    (f"{TRAIN} train_batch_size=0", r"train_batch_size = 0", "at least 1"),
    (f"{TRAIN} bf16.enabled=auto", r"'auto'", "give a value"),
    (f"{TRAIN} model.preset=bsae", r"model\.preset = 'bsae'", "choose one of base"),
    (f"{TRAIN} clip.source=picture", r"clip\.source", "choose one of text, image, both"),
    (f"{TRAIN} clip.model=ViT-Q", r"no CLIP model that open_clip knows", "did you mean"),
    (f"{TRAIN} train.precision=fp8", r"train\.precision", "choose one of fp32"),
    (f"{TRAIN} ema.decay=1.5", r"ema\.decay = 1\.5", "between 0 and 1"),
    # files and data
    ("train --dry_run --ds_config DIR/none.json", r"none\.json can't be read", "correct it"),
    (f"{TRAIN} data.shards=DIR/photos", "none of the 1 pictures", "give each picture a caption"),
    (f"{TRAIN} data.shards=DIR/photos/*.png", "none of the 1 pictures", "give each picture a caption"),
    (f"{TRAIN} data.shards=DIR/photos/*.gif", "names pictures", r"prepare pack \S+photos --out"),
    (f"{TRAIN} data.shards=DIR/photos/one.png", "names pictures", r"prepare pack \S+photos --out"),
    (f"{TRAIN} data.shards=DIR/none-*.tar", "matches no file", "correct the pattern"),
    (f"{TRAIN} data.shards=", r"data\.shards = None has the wrong type", "give a value of type str"),
    (f"{TRAIN} data.shapes_samples=3", "fewer than one global batch", "lower train_batch_size to 3"),
    (f"{TRAIN} model.weights=DIR/none.pt", "neither a file nor one of", "correct the path"),
    # other commands
    ("plan --ds_config DIR/none.json", r"none\.json can't be read", "correct it"),
    (f"plan --ds_config {TINY} --gpu cpu --set data.shapes_samples=3", "fewer than one global", "lower"),
    (f"plan --ds_config {TINY} --gpu cpu --gpus 7", "train_batch_size", "use"),
    ("export DIR/none --out DIR/x.pt", "no committed checkpoint", "give a run directory"),
    ("export DIR/none --out DIR/x", "names no format", r"\.pt or \.safetensors"),
    ("export DIR/none --out /proc/x.pt", "/proc can't be written", "another place"),
    ("sample DIR/none.pt --prompt x --out DIR/x.png", "neither a file, a folder", "correct the path"),
    ("sample builtin:tiny --prompt x --out DIR/x", "names no format", r"\.png or \.jpg"),
    ("sample builtin:tiny --prompt x --out /proc/x.png", "/proc can't be written", "another place"),
    ("sample builtin:tiny --prompt x --out_dir /proc/x", "/proc/x can't be written", "another place"),
    ("sample builtin:tiny --out DIR/x.png", "nothing to draw", "give --prompt"),
    ("evaluate DIR/none.pt", "neither a file, a folder", "correct the path"),
    ("prepare pack DIR/none --out DIR/shards", "none", ""),
    ("prepare pack DIR/photos --out /proc/x", "/proc/x can't be written", "another place"),
    ("prepare pack DIR/photos --out DIR/x --hold_out 2", "is no share", "such as 0.02"),
    ("prepare shapes --count 4 --out /proc/x", "/proc/x can't be written", "another place"),
    ("prepare clip DIR/none-*.tar --out /proc/x", "/proc/x can't be written", "another place"),
    ("evaluate builtin:tiny --out /proc/x.json", "/proc can't be written", "another place"),
    ("report DIR/none --out /proc/x.html", "/proc can't be written", "another place"),
    ("config schema --out /proc/x.json", "/proc can't be written", "another place"),
    ("prepare index DIR/none-*.tar", "matches no file", "correct the pattern"),
]


@pytest.mark.parametrize(("line", "fact", "remedy"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_answered(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    fact: str,
    remedy: str,
):
    monkeypatch.chdir(root)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(line.replace("DIR", str(tmp_path)).split()) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("glide-ds: error: ")
    assert re.search(fact, told), told
    assert re.search(remedy, told), told
    assert "Traceback" not in told
    assert sorted(tmp_path.rglob("*")) == before


UNDER_LAUNCHERS = (
    "lr=1e-4",
    "train.epochs=3",
    "train.steps=-3",
    "train.phase=fuul",
    "zero_optimization.stage=3",
    "fp16.enabled=true",
    "data.shards=DIR/photos",
    "data.shards=DIR/none-*.tar",
    "data.shapes_samples=3",
    "model.weights=DIR/none.pt",
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ten_mistakes_are_answered_under_a_launcher(root: Path, tmp_path: Path, launcher: str):
    """By one message of ours, which is the terminal's last line, from two ranks."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    start = {
        "deepspeed": ["deepspeed", "--quiet", "--num_gpus", "2", "--master_port", "29653"],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "29654"],
    }[launcher]
    environment = without_launcher() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["GLIDE_DS_CACHE"] = str(tmp_path / "cache")
    for mistake in UNDER_LAUNCHERS:
        fact, remedy = next(row[1:] for row in MISTAKES if row[0] == f"{TRAIN} {mistake}")
        line = f"launch/train.py --ds_config {TINY} --set run.dir=DIR/run {mistake}".replace(
            "DIR", str(tmp_path)
        )
        command = [str(Path(sys.executable).parent / start[0]), *start[1:], *line.split()]
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == (2 if launcher == "deepspeed" else 1), (mistake, done.stdout)
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith("glide-ds: error: "), (mistake, done.stdout)
        assert re.search(fact, last), (mistake, last)
        assert re.search(remedy, last), (mistake, last)
        assert len(set(re.findall("glide-ds: error: .*", done.stdout))) == 1, (mistake, done.stdout)


def test_more_ranks_than_gpus_are_refused_and_than_cores_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from glide_ds.training import run

    monkeypatch.setattr(run, "start_process_group", lambda _: sys.exit("the process group was started"))
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "64"}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1})
    words = ["train", "--ds_config", str(write_config(tmp_path)), "--set", "train_batch_size=64"]
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        cli.main(words)
    assert re.search(
        r"!! 64 ranks on 2 cores .* 32 times as long; deepspeed --num_gpus 2", capsys.readouterr().out
    )
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 8)
    assert cli.main(words) == 2
    assert re.search(r"64 ranks were started .* 8 GPUs.*--num_gpus 8", capsys.readouterr().err)


def test_an_environment_without_glide_ds_is_told(root: Path):
    command = [sys.executable, "-S", "-I", str(root / "launch" / "train.py"), "--ds_config", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "glide_ds is not installed for" in done.stderr
    assert "launch/env.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_python_gets_a_sentence(root: Path):
    code = "import sys; sys.version_info = (3, 10, 13); import glide_ds"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "glide_ds needs Python 3.11 or newer" in done.stderr
    assert "launch/env.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_packed_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each command names the next one, and that one takes it."""
    assert cli.main(["prepare", "shapes", "--count", "8", "--out", str(tmp_path / "shards")]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(told.removeprefix("Next: glide-ds "))
    args = cli.build_parser(words).parse_args(words)
    (config,) = load_configs(args.ds_config, None, args.set)
    assert open_shards(config.data.shards).urls


def test_a_long_prompt_and_a_negative_guidance_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--steps", "1", "--guidance", "-3", "--out", str(tmp_path / "x.png")]
    assert cli.main(["sample", "builtin:tiny", "--prompt", "a red circle " * 80, *words]) == 0
    told = capsys.readouterr().out
    assert re.search(r"!! of 'a red circle .* the model reads \d+ tokens of \d{3}: the end is cut off", told), (
        told
    )
    assert "is 3 meant?" in told
