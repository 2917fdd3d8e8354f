"""Names and surroundings as people have them: each works, or is answered in a line that says what to do."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_kit import encoded, photo, write_shards
from ranks import ROOT, Run, Warm
from train_kit import metrics, without_launcher, write_config

from glide_ds.cli import main, without_local_rank
from glide_ds.config import cache_dir, load_config
from glide_ds.environment import is_first, read_environment
from glide_ds.errors import ConfigError
from glide_ds.files import user_path

PARTS = "*.partial"


# ---- names


@pytest.mark.parametrize("key", ["run.dir", "data.index_dir", "data.clip_store", "data.cache_dir"])
def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (config,) = load_config(write_config(tmp_path), sets=[f"{key}=~/x"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == str(tmp_path / "home" / "x")
    with pytest.raises(ConfigError, match=rf"{key} = '~nobody-here/x'.*set HOME"):
        load_config(write_config(tmp_path), sets=[f"{key}=~nobody-here/x"])


def test_a_tilde_in_every_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    (tmp_path / "over.yaml").write_text("train: {steps: 7}\n")
    assert main(["prepare", "shapes", "--out", "~/shards", "--count", "4"]) == 0
    assert main(["prepare", "index", "~/shards", "--index_dir", "~/index", "--workers", "1"]) == 0
    assert main(["config", "diff", "~/full.json", "~/full.json"]) == 0
    words = ["train", "--ds_config", "~/full.json", "--config", "~/over.yaml", "--dry_run"]
    assert main([*words, "--set", "run.dir=~/r", "data.shards=~/shards", "data.index_dir=~/index"]) == 0
    assert "7 to go of 7" in capsys.readouterr().out
    assert len(list((tmp_path / "index").glob("*.index"))) == 1
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "name", ["a[b]", "run #1", "#1", "what?", "star*", "{0..3}", "0012", "2026-01-02", "1e5", "yes", "a: b"]
)
def test_a_run_directory_has_the_very_name_that_is_given(tmp_path: Path, name: str):
    (config,) = load_config(write_config(tmp_path), sets=[f"run.dir={name}"])
    assert config.run.dir == name
    (quoted,) = load_config(write_config(tmp_path), sets=[f"run.dir='{name}'"])
    assert quoted == config


def test_a_number_is_read_as_people_mean_it(tmp_path: Path):
    path, over = write_config(tmp_path), tmp_path / "over.yaml"
    for text in ("012", "0012", "1:30", "08"):
        with pytest.raises(ConfigError, match=rf"train.steps = '{text}'.*type int"):
            load_config(path, sets=[f"train.steps={text}"])
        over.write_text(f"train:\n  steps: {text}\n")
        with pytest.raises(ConfigError, match=rf"train.steps = '{text}'.*type int"):
            load_config(path, over)
    for text, value in (("1e-1", 0.1), ("0.1", 0.1), ("1_0.5", 10.5), (".5", 0.5), ("2", 2.0), ("1.e1", 10.0)):
        assert load_config(path, sets=[f"train.kl_weight={text}"])[0].train.kl_weight == value
    assert load_config(path, sets=["train.steps=1_000"])[0].train.steps == 1000


def test_shards_keep_what_stands_behind_a_hash(tmp_path: Path):
    path = write_config(tmp_path)
    for text in ("/d/a #1.tar", "#1.tar", "/d/a#1.tar", "{000..001} #.tar"):
        assert load_config(path, sets=[f"data.shards={text}"])[0].data.shards == text
    assert load_config(path, sets=["data.shards=['a #1.tar', b#2.tar]"])[0].data.shards == (
        "a #1.tar",
        "b#2.tar",
    )


@pytest.mark.parametrize("option", ["--ds_config", "--config"])
def test_a_file_in_another_encoding_is_named(tmp_path: Path, option: str):
    plain, over = write_config(tmp_path), tmp_path / "over.yaml"
    over.write_text("train: {steps: 7}  # pünktlich\n", encoding="utf-8")
    changed = plain if option == "--ds_config" else over
    text = changed.read_text(encoding="utf-8").replace('"full"', '"füll"')
    changed.write_text(text, encoding="utf-16")
    with pytest.raises(ConfigError, match=rf"{option} .*{changed.name} is not UTF-8 text: it is UTF-16.*iconv"):
        load_config(plain, over)
    changed.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"{option} .*{changed.name} is not UTF-8 text: byte \d+ .*iconv"):
        load_config(plain, over)
    changed.write_text(text.replace("füll", "full"), encoding="utf-8-sig")
    assert load_config(plain, over)[0].train.steps == 7


def test_a_key_given_twice_is_refused(tmp_path: Path):
    path, over = tmp_path / "a.json", tmp_path / "over.yaml"
    path.write_text('{"train_batch_size": 4, "glide_ds": {"train": {"steps": 5, "phase": "base", "steps": 7}}}')
    with pytest.raises(ConfigError, match=r"a.json gives the key 'steps' more than once \(5 and 7\)"):
        load_config(path)
    over.write_text("train:\n  steps: 5\ntrain:\n  phase: base\n")
    with pytest.raises(ConfigError, match="'train' is given more than once"):
        load_config(write_config(tmp_path), over)


# ---- what launchers set


@pytest.mark.parametrize(
    "words", [["--local-rank=3"], ["--local_rank=3"], ["--local-rank", "3"], ["--local_rank", "3"]]
)
def test_a_launchers_option_is_passed_over(words: list[str]):
    assert without_local_rank([*words, "train", "--x"]) == ["train", "--x"]
    assert without_local_rank(["train", "3", *words]) == ["train", "3"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK='x' is no number"),
        ({"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK='' is no number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is no number"),
        ({"RANK": "2", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK=2 is not below WORLD_SIZE=1"),
    ],
)
def test_half_a_launch_is_named(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], said: str):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        read_environment()
    assert is_first()  # else nobody would say it


# ---- surroundings


def test_a_cache_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("HOME", "XDG_CACHE_HOME", "GLIDE_DS_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_dir() == tmp_path / f"glide_ds-{os.getuid()}"
    with pytest.raises(ConfigError, match="set HOME"):
        user_path("~/x")
    assert main(["export", "~/run", "--out", "x.pt"]) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that gives an empty disk of so many KiB."""
    made: list[Path] = []

    def mount(kib: int) -> Path:
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(place)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("words", [["x.pt"], ["x.safetensors"], ["x.pt", "--split_adapter"]])
@pytest.mark.parametrize("spare", [-1000, 0])
def test_an_export_to_a_full_disk_leaves_nothing(
    trained: Path,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    spare: int,
):
    command = ["export", str(trained / "run"), "--out"]
    if not spare:  # room for the weights to the last page, and none for what lies beside them
        assert main([*command, str(tmp_path / words[0]), *words[1:]]) == 0
        spare = sum(-(-path.stat().st_size // 4096) * 4 for path in tmp_path.glob(f"x*{Path(words[0]).suffix}"))
    else:
        spare = 64
    disk = small_disk(spare)
    assert main([*command, str(disk / words[0]), *words[1:]]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert list(disk.iterdir()) == []


def test_a_picture_on_a_full_disk_leaves_nothing(
    trained: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
):
    disk = small_disk(8)
    command = ["sample", str(trained / "run"), "--prompt", "x", "--steps", "2", "--n", "30", "--out"]
    assert main([*command, str(disk / "x.png")]) == 75
    assert f"{disk / 'x.png'}: No space left" in capsys.readouterr().err
    assert list(disk.iterdir()) == []
    assert main([*command, str(disk / "x.what")]) == 2
    assert "names no format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kib", "command"),
    [
        (64, ["prepare", "shapes", "--count", "200", "--out"]),
        (64, ["prepare", "pack", "PHOTOS", "--workers", "1", "--out"]),
        (4, ["prepare", "index", "SHARDS", "--workers", "1", "--index_dir"]),
        (8, ["prepare", "clip", "SHARDS", "--model", "builtin:tiny", "--out"]),
        (4, ["config", "schema", "--out"]),
    ],
)
def test_prepare_on_a_full_disk_leaves_no_half_of_a_file(
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    kib: int,
    command: list[str],
):
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encoded(photo(number, 64, 64)))
        (tmp_path / "photos" / f"{number}.txt").write_text("a photo")
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [40, 40, 40])
    places = {"PHOTOS": str(tmp_path / "photos"), "SHARDS": str(tmp_path / "shards")}
    disk = small_disk(kib)
    assert main([*(places.get(word, word) for word in command), str(disk / "out")]) in (1, 75)
    assert "No space left" in capsys.readouterr().err
    assert list(disk.rglob(PARTS)) == []
    assert all(path.stat().st_size for path in disk.rglob("*"))


def unshared(script: str, folder: Path, *words: str) -> str:
    """What a command says in a mount namespace of its own, after `script`."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    environment = {**without_launcher(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'{script}; exec "$@"',
        "sh",
        sys.executable,
        "-m",
        "glide_ds",
        *words,
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_a_run_with_little_shared_memory_takes_files_and_says_so(tmp_path: Path):
    config = write_config(tmp_path, train={"steps": 2}, data={"workers": 2})
    little = "mount -t tmpfs -o size=64k none /dev/shm"
    said = unshared(little, tmp_path, "train", "--ds_config", str(config))
    assert said.startswith("0")
    assert said.count("files in /tmp take its place") == 1
    plain = write_config(tmp_path / "plain", train={"steps": 2})
    unshared(":", tmp_path, "train", "--ds_config", str(plain))
    assert metrics(tmp_path, steady=True) == metrics(tmp_path / "plain", steady=True)
    none = (
        f"{little}; mount -t tmpfs -o size=4k none /tmp; dd if=/dev/zero of=/tmp/full bs=4k count=1 2>/dev/null"
    )
    if not tmp_path.is_relative_to("/tmp"):
        assert "data.workers=0" in unshared(
            none, tmp_path, "train", "--ds_config", str(config), "--set", "train.steps=3"
        )


@pytest.mark.slow
def test_a_run_without_home_and_account(tmp_path: Path):
    config = write_config(tmp_path, train={"steps": 1}, data={"workers": 1})
    (tmp_path / "passwd").touch()
    script = f"mount --bind {tmp_path}/passwd /etc/passwd; unset HOME GLIDE_DS_CACHE; export TMPDIR={tmp_path}"
    assert unshared(script, tmp_path, "train", "--ds_config", str(config)).startswith("0")
    command = ["sample", str(tmp_path / "run"), "--prompt", "x", "--steps", "2", "--out"]
    assert unshared(script, tmp_path, *command, "x.png").startswith("0")


@pytest.mark.slow
def test_a_run_that_can_only_be_read(tmp_path: Path):
    config = write_config(tmp_path, train={"steps": 1})
    assert unshared(":", tmp_path, "train", "--ds_config", str(config)).startswith("0")
    run = tmp_path / "run"
    script = f"mount --bind {run} {run}; mount -o remount,bind,ro {run}"
    assert unshared(script, tmp_path, "export", str(run), "--out", "x.pt").startswith("0")
    command = ["sample", str(run), "--prompt", "x", "--steps", "2", "--out"]
    assert unshared(script, tmp_path, *command, "x.png").startswith("0")
    again = unshared(script, tmp_path, "train", "--ds_config", str(config), "--set", "train.steps=2")
    assert again.startswith("2")
    assert "can't be written" in again


@pytest.mark.slow
def test_a_run_with_few_open_files(tmp_path: Path):
    shards = write_shards(tmp_path, [4] * 70)
    config = write_config(tmp_path, train={"steps": 3}, data={"workers": 2, "shards": shards})
    said = unshared("ulimit -n 64", tmp_path, "train", "--ds_config", str(config))
    assert said.startswith("0"), said


@pytest.mark.slow
def test_ranks_of_brackets(warm: Warm, tmp_path: Path):
    run = Run(warm, tmp_path / "a[0-9]*")
    run.train(2, 2)
    assert run.wait() == [0, 0], run.said()
    run.train(1, 3)
    assert run.wait() == [0], run.said()
    assert "resumes at step 2" in run.said()
    assert main(["export", str(run.dir), "--out", str(run.folder / "x.pt")]) == 0
