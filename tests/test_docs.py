"""README and docs/: their commands are accepted, what they link to is there, and the first run can be walked."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from train_kit import without_launcher

from glide_ds.cli import build_parser
from glide_ds.config import load_configs

ROOT = Path(__file__).parents[1]
EMOJI = ROOT.parent / "shared" / "data" / "emoji"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LAUNCHER = re.compile(r"(.*? )?(launch/train\.py|--module glide_ds|-m glide_ds) ")


def blocks(page: Path, kind: str | None = None) -> Iterator[str]:
    for found, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind is None or found == kind:
            yield text


def commands(page: Path) -> list[list[str]]:
    """The words of every command line, without comments and without examples that leave something out."""
    found = []
    for text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"(glide-ds|deepspeed|torchrun|srun|bash|sbatch) ", line) and "…" not in line:
                found.append(shlex.split(line, comments=True))
    return found


def ours(words: list[str]) -> list[str] | None:
    """What follows `glide-ds` in a command line, or in one by a launcher; None where that is not called."""
    if words[0] == "glide-ds":
        return words[1:]
    line = shlex.join(words)
    if not (match := LAUNCHER.match(line)):
        return None
    rest = shlex.split(line[match.end() :])
    return ["train", *rest] if match[2].startswith("launch") else rest


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_is_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser of its command, and its configuration's keys by the configuration."""
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if (arguments := ours(words)) is not None:
            args = build_parser(arguments).parse_args(arguments)
            if hasattr(args, "ds_config"):
                load_configs(args.ds_config, None, args.set)
        else:
            scripts = [word for word in words if re.match(r"(launch|slurm|benchmarks|\.ci)/", word)]
            assert scripts, words
            assert all((ROOT / script).exists() for script in scripts), words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8"))
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert lost == []
    files = re.findall(
        r"`((?:ds_configs|launch|slurm|benchmarks|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")
    )
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_pages_are_short() -> None:
    long = [page.name for page in PAGES if len(page.read_text(encoding="utf-8").splitlines()) > 150]
    assert long == ["config.md"]  # which a command makes


def test_the_messages_that_are_explained_are_ours() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        text for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for text in re.findall("`(.*?)`", row)
    ]
    fixed = [
        part.strip() for text in quoted for part in re.split(r"…|\bN\b|\bM\b", text) if len(part.strip()) > 5
    ]
    sources = "".join(
        path.read_text(encoding="utf-8") for path in [*ROOT.glob("glide_ds/**/*.py"), *ROOT.glob("launch/*.py")]
    )
    assert len(fixed) > 10
    assert [part for part in fixed if part not in sources] == []


def test_the_container_recipes_copy_what_is_there_and_alike() -> None:
    docker = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for name in line.split()}
    apptainer = (ROOT / "launch" / "glide_ds.def").read_text(encoding="utf-8")
    assert copied == set(re.findall(r"^    (\S+) /glide_ds/", apptainer, re.MULTILINE))
    assert {"glide_ds", "pyproject.toml", "launch"} <= copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert len(set(re.findall(r"bash launch/env\.sh.*", docker + apptainer))) == 1


@pytest.mark.slow
def test_the_first_run_can_be_walked(tmp_path: Path) -> None:
    """Every command of docs/first-run.md on 100 pictures, with fewer steps: from photos to a page of pictures."""
    if not EMOJI.exists():
        pytest.skip(f"no pictures in {EMOJI}")
    (tmp_path / "photos").mkdir()
    with tarfile.open(min(EMOJI.glob("*.tar"))) as tar:
        for member in tar.getmembers()[:200]:
            name = member.name.replace("00000000.", "corgi.")
            (tmp_path / "photos" / name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = "".join(blocks(ROOT / "docs" / "first-run.md", "walk"))
    text = text.replace(
        "train.steps=150 validation.every=50 log.samples_every=75", "train.steps=4 validation.every=2"
    )
    text = text.replace("runs/three\n", "runs/three train.steps=21 log.samples_every=0\n", 1)
    text = text.replace("--count 24 --samples 24 --steps 25", "--count 20 --samples 20 --steps 3")
    surroundings = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GLIDE_DS_CACHE": str(tmp_path / "cache"),
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=tmp_path,
        env={**without_launcher(), **surroundings},
        capture_output=True,
        text=True,
        check=False,
        timeout=570,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "validation on 2" in done.stdout  # of the pictures that were held out
    for name in ("shards/contact.png", "pictures.png", "figures.json", "report.html", "variations.png"):
        assert (tmp_path / name).stat().st_size > 500, name
