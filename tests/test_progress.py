"""What is said of how far, how fast and how long still."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest

from glide_ds import progress as module
from glide_ds.progress import Progress, Status, coloured, columns, duration, told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands where a test puts it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_elsewhere_a_line_comes_now_and_then(clock):
    out = io.StringIO()
    progress = Progress("indexing", 40, "shards", stream=out)
    progress.advance(5)
    assert out.getvalue() == ""
    clock.now += 10
    progress.advance(5)
    progress.advance(5)
    assert out.getvalue() == "indexing 10/40 shards, 1 shards/s, 30 s left\n"


def test_a_resumed_count_does_not_flatter_the_rate(clock):
    out = io.StringIO()
    progress = Progress("base.pt", 2_000_000, "B", done=1_000_000, scaled=True, stream=out)
    clock.now += 10
    progress.advance(500_000, note="resumed")
    assert out.getvalue() == "base.pt 1.50M/2.00M B, 50.0k B/s, 10 s left  resumed\n"
    assert progress.left_s() == 10


def test_on_a_terminal_there_is_a_bar_and_lines_stand_above_it():
    out = Terminal()
    with Progress("drawing", 2, "steps", stream=out) as progress:
        progress.advance()
        progress.line("a line")
        progress.advance()
    assert "drawing" in out.getvalue()
    assert "100%" in out.getvalue()
    assert "a line\n" in out.getvalue()


def test_other_ranks_count_in_silence(clock):
    out = io.StringIO()
    progress = Progress("drawing", 2, shown=False, stream=out)
    clock.now += 100
    progress.advance()
    progress.line("a line")
    assert out.getvalue() == ""
    assert progress.done == 1


def test_items_are_counted_once_they_are_done(clock):
    out = io.StringIO()
    seen = []
    for item in told("drawing", "steps", stream=out)([1, 2, 3]):
        seen.append(item)
        clock.now += 6
    assert seen == [1, 2, 3]
    assert out.getvalue().splitlines()[0] == "drawing 1/3 steps, 0.167 steps/s, 12 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0184, "0.02 s"),
        (42.4, "42 s"),
        (200, "3 min 20 s"),
        (3600 * 5 + 720, "5 h 12 min"),
        (3600 * (24 * 41 + 16), "41 days 16 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("wide", "shown"), [(20, 60), (60, 60), (80, 80), (200, 100)])
def test_what_is_printed_fits_the_terminal(monkeypatch, wide, shown):
    monkeypatch.setenv("COLUMNS", str(wide))
    assert columns() == 100  # no terminal
    monkeypatch.setattr(module.sys, "stdout", Terminal())
    assert columns() == shown
    master, slave = pty.openpty()  # tqdm asks the kernel
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, wide, 0, 0))
    with open(slave, "w", encoding="utf-8") as place:
        bar, status = (
            Progress("adapter_gates", 100_000, "step", stream=place),
            Status(in_place=True, stream=place),
        )
        bar.advance(note="loss 0.1234, 1234.5 images/s, MFU 33%")
        status.told = -1e9
        status.say("x" * 300)
        bar.close()
        lines = re.split("[\r\n]", os.read(master, 65536).decode())
    os.close(master)
    assert any("adapter_gates" in line for line in lines)
    assert max(len(line) for line in lines) <= max(wide, 60)


def test_colour_is_for_terminals_that_have_it(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert coloured("!!") == "!!"
    monkeypatch.setattr(module.sys, "stdout", Terminal())
    assert coloured("!!") == "\033[33m!!\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("!!") == "!!"
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert coloured("!!") == "!!"


def test_what_is_being_done_is_said_now_and_then(clock):
    out, place = io.StringIO(), io.StringIO()
    plain, in_place = Status(stream=out), Status(in_place=True, stream=place)
    for text in ("one", "two", "three"):
        plain.say(text)
        in_place.say(text)
        clock.now += 3
    assert out.getvalue() == "  …    three\n"
    assert place.getvalue().split("\r") == ["", f"  …    {'two':<90}", f"  …    {'three':<90}"]
