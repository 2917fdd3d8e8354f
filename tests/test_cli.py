"""The command line: quick help, examples that parse, clean errors, and the command that needs no model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from glide_ds import __version__, cli
from glide_ds.commands import prepare_shapes
from glide_ds.data import shapes


def test_help_imports_no_torch():
    code = "import sys; from glide_ds.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in cli.COMMANDS:
        assert command.words[0] in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert re.fullmatch(
        rf"glide_ds {re.escape(__version__)}, torch 2\.\S+, deepspeed 0\.\S+, Python 3\.\S+\n", told
    )


def completions(line: str) -> list[str]:
    """What a shell is told, as argcomplete's own script asks for it."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "IFS": "\n"}
    command = [sys.executable, "-m", "glide_ds"]
    out = ["bash", "-c", 'exec 8>&1 9>/dev/null; exec "$@" >/dev/null', "bash", *command]
    done = subprocess.run(
        out, env=os.environ | asked | {"_ARGCOMPLETE_IFS": "\n"}, capture_output=True, text=True
    )
    return [word.strip() for word in done.stdout.splitlines()]


def test_a_shell_completes_commands_and_options():
    assert "preflight" in completions("glide-ds pre")
    assert {"shapes", "pack", "index", "clip"} <= set(completions("glide-ds prepare "))
    assert "--split_adapter" in completions("glide-ds export --spl")


def test_the_doctor_tells_on_one_screen_what_a_bug_report_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path))
    (tmp_path / "base.pt").write_bytes(bytes(2**20))
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    told = "\n".join(lines)
    for part in (
        __version__,
        "torch 2.",
        "deepspeed 0.",
        "GiB free",
        "base.pt (1 MiB)",
        "NCCL_DEBUG=INFO",
        "cores",
    ):
        assert part in told, part


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: "-".join(c.words))
def test_every_example_is_shown_and_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.words, "--help"])
    assert stop.value.code == 0
    assert command.example in capsys.readouterr().out
    program, *arguments = shlex.split(command.example)
    assert program == "glide-ds"
    assert callable(cli.build_parser(arguments).parse_args(arguments).handler)


def test_a_group_shows_the_examples_of_all_its_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    shown = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert (command.example in shown) is (command.words[0] == "prepare")


@pytest.mark.parametrize("arguments", [[], ["prepare"], ["frobnicate"], ["prepare", "shapes", "--out", "x"]])
def test_an_incomplete_line_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: glide-ds" in capsys.readouterr().err


PREPARE = ["prepare", "shapes", "--count", "12", "--out"]


def test_a_mistake_is_one_clean_message(tmp_path, capsys):
    assert cli.main([*PREPARE, str(tmp_path), "--per_shard", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("glide-ds: error: ")
    assert "per_shard=0" in captured.err
    assert captured.err.count("\n") == 1


def test_a_mistake_in_a_configuration_is_too(capsys):
    arguments = ["--ds_config", "ds_configs/tiny/phase3.json", "--dry_run", "--set", "trian.steps=2"]
    assert cli.main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("glide-ds: error: --set trian.steps=2: unknown key 'trian'")
    assert captured.err.count("\n") == 1
    assert captured.out == "glide_ds: reading ds_configs/tiny/phase3.json\n"


def test_ctrl_c_is_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_shapes, "write_shards", interrupt)
    assert cli.main([*PREPARE, str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare_shapes, "write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*PREPARE, str(tmp_path)])


def test_what_a_command_returns_is_the_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare_shapes, "run", lambda _: 3)
    assert cli.main([*PREPARE, str(tmp_path)]) == 3


def test_prepared_shards_are_those_of_the_arguments(tmp_path, capsys):
    out = tmp_path / "shards"
    arguments = ["--per_shard", "8", "--size", "48", "--held_out", "--seed", "4"]
    assert cli.main([*PREPARE, str(out), *arguments]) == 0
    assert "12 samples in 2 shards" in capsys.readouterr().out
    paths = shapes.write_shards(tmp_path / "same", 12, 8, 48, seed=4, start=shapes.HELD_OUT)
    assert [p.read_bytes() for p in paths] == [(out / p.name).read_bytes() for p in paths]
