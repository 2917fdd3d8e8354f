"""`prepare index` is parallel, resumable after a kill at any instant, and honest about damage."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from data_kit import kill_while_writing, write_shards

from glide_ds.commands import prepare_index as index
from glide_ds.data.tars.shards import expand


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    index.add_arguments(parser)
    return parser.parse_args(words)


def test_parallel_equals_serial_and_a_second_run_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_shards(tmp_path, [3, 5, 2, 4])
    assert index.run(arguments(pattern, "--index_dir", str(tmp_path / "a"), "--workers", "1")) == 0
    assert index.run(arguments(pattern, "--index_dir", str(tmp_path / "b"), "--workers", "3")) == 0
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in "ab")
    assert a == b
    assert sorted(name.rpartition(".")[2] for name in a) == ["catalog", *["index"] * 4]
    index.run(arguments(pattern, "--index_dir", str(tmp_path / "a")))
    assert "14 samples; 0 indexes made, 4 were there" in capsys.readouterr().out


def test_damage_and_change_give_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_shards(tmp_path, [3, 3])
    index.run(arguments(pattern))
    path = tmp_path / "s-001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    assert index.run(arguments(pattern)) == 1
    assert "s-001.tar: changed" in capsys.readouterr().err
    assert index.run(arguments(pattern, "--force")) == 1
    assert "s-001.tar: it ends at byte 5000" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_byte_identical(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [60] * 80)
    code = "import argparse, sys; from glide_ds.commands import prepare_index as index; "
    code += "p = argparse.ArgumentParser(); "
    code += "index.add_arguments(p); sys.exit(index.run(p.parse_args(sys.argv[1:])))"
    folder = tmp_path / "killed"
    words = [pattern, "--index_dir", str(folder), "--workers", "2"]
    kill_while_writing(code, words, folder, "*.index", (1, 11, 22))
    assert len(list(folder.glob("*.index"))) < 80
    assert index.run(arguments(pattern, "--index_dir", str(tmp_path / "killed"))) == 0
    assert index.run(arguments(pattern, "--index_dir", str(tmp_path / "whole"))) == 0
    killed, whole = (
        {p.name: p.read_bytes() for p in (tmp_path / d).glob("*.index")} for d in ("killed", "whole")
    )
    assert killed == whole
    assert len(whole) == len(expand(pattern))
