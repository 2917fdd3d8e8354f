"""The command line: quick help, examples that parse, clean errors, and the two commands that need no model."""

import shlex
import subprocess
import sys
import tarfile
import time

import pytest

from glide_ds import __version__, cli
from glide_ds.data import shapes
from glide_ds.types import DataError


def test_help_is_quick_and_imports_no_torch():
    code = "import sys; from glide_ds.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    took = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    for command in cli.COMMANDS:
        assert command.words[0] in result.stdout
    assert took < 0.5  # measured: 0.05 s


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: "-".join(c.words))
def test_every_example_is_shown_and_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.words, "--help"])
    assert stop.value.code == 0
    assert command.example in capsys.readouterr().out
    program, *arguments = shlex.split(command.example)
    assert program == "glide-ds"
    assert callable(cli.build_parser(arguments).parse_args(arguments).run)


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


def test_a_mistake_is_one_clean_message(tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("glide-ds: error: ")
    assert "nothing does not exist" in captured.err
    assert captured.err.count("\n") == 1


def test_ctrl_c_is_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("glide_ds.evaluate.read_pictures", interrupt)
    assert cli.main(["evaluate", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("glide_ds.evaluate.read_pictures", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", str(tmp_path)])


def test_written_shards_are_evaluated(tmp_path, capsys):
    out = tmp_path / "shards"
    line = ["prepare", "shapes", "--out", str(out), "--count", "12", "--per_shard", "8", "--size", "48"]
    assert cli.main([*line, "--held_out", "--seed", "4"]) == 0
    assert "12 samples in 2 shards" in capsys.readouterr().out
    assert cli.main(["evaluate", str(out / "shapes-000000.tar"), "--min_colour", "1", "--min_shape", "1"]) == 0
    assert "colour 100.0%, shape 100.0%, size 100.0%, position 100.0% right in 8" in capsys.readouterr().out
    paths = shapes.write_shards(tmp_path / "same", 12, 8, 48, seed=4, start=shapes.HELD_OUT)
    assert [p.read_bytes() for p in paths] == [(out / p.name).read_bytes() for p in paths]


@pytest.fixture
def folder(tmp_path):
    """Four pictures, of which one shows another caption's shapes."""
    from PIL import Image

    for index in (2, 0, 3, 1):
        image, caption = shapes.draw(index, 64)
        if index == 3:
            caption = "a small red ring above a large blue ring"  # it is a small green triangle
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(caption + "\n")
    return tmp_path


def test_a_score_below_the_wanted_one_fails_and_names_it(folder, capsys):
    assert cli.main(["evaluate", str(folder), "--list"]) == 0
    shown = capsys.readouterr().out
    assert "3.png: colour, shape, size, position wrong: a small red ring" in shown
    assert shown.count("wrong") == 1
    assert "colour 75.0%" in shown
    assert "in 4 pictures" in shown
    assert cli.main(["evaluate", str(folder), "--min_colour", "0.75"]) == 0
    assert cli.main(["evaluate", str(folder), "--min_shape", "0.76"]) == 1
    assert "shape 0.750 is below 0.760" in capsys.readouterr().out


def test_pictures_come_in_the_order_of_their_names(tmp_path):
    from glide_ds.evaluate import read_pictures

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for index in (2, 0, 1):
            shard = shapes.write_shards(tmp_path / str(index), 1, start=index)[0]
            with tarfile.open(shard) as single:
                for member in single:
                    tar.addfile(member, single.extractfile(member))
    pictures = list(read_pictures(tmp_path / "x.tar"))
    assert [p.name for p in pictures] == [f"{index:09d}.png" for index in range(3)]
    assert [p.caption for p in pictures] == [shapes.draw(index)[1] for index in range(3)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "1.txt").unlink(), "1.png has no caption"),
        (lambda d: (d / "1.png").write_bytes(b"no picture"), "1.png cannot be read as a picture"),
        (lambda d: (d / "1.txt").write_bytes(b"\xff\xfe"), "not one of the built-in shapes"),
        (lambda d: [p.unlink() for p in d.iterdir()], "no picture to grade"),
    ],
)
def test_a_spoilt_folder_is_named(folder, spoil, message, capsys):
    spoil(folder)
    assert cli.main(["evaluate", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_tar_is_named(tmp_path):
    from glide_ds.evaluate import read_pictures

    path = tmp_path / "x.tar"
    path.write_text("hello")
    with pytest.raises(DataError, match=r"x\.tar is not a readable tar"):
        next(read_pictures(path))
