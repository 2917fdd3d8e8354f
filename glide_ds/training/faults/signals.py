"""The signals that ask a run to stop, caught before anything slow is imported (no torch in here).

SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is closed), SIGUSR1, SIGUSR2 and SIGXCPU (a limit of processor time)
ask for a stop at the next step (stopping.py). The same signal again, REPEAT_S or more later, ends the process at once
with code 128 + number; the last commit stands. What comes sooner, or is another signal, is the same request: torchrun
hands a Ctrl-C on to ranks that the terminal has told already, and the deepspeed launcher follows it with SIGTERM; and
so is what nobody insists by: the kernel sends SIGXCPU every second, a shell and a terminal each a SIGHUP. Under nohup
a SIGHUP stays ignored.

Python runs a signal's handler in the main thread, between two bytecodes: not while it waits in a collective.
So a thread of its own reads the numbers from a pipe that Python fills the moment a signal comes.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from glide_ds.environment import is_first
from glide_ds.training.faults.last_word import parent

REPEAT_S = 2.0
PR_SET_PDEATHSIG = 1
LAUNCHED = {"deepspeed": "CROSS_RANK", "torchrun": "TORCHELASTIC_RUN_ID"}  # variables that they give to ranks
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
ONCE = (signal.SIGHUP, signal.SIGXCPU)  # not a person's wish that it be at once, however often they come
NOBODY = (errno.EIO, errno.EPIPE)  # what writing to a closed terminal or pipe gives


class StopSignals:
    """What this process was asked by signals."""

    def __init__(self) -> None:
        self.started = time.monotonic()  # with the module's import: the process's start, as near as matters
        self.asked: signal.Signals | None = None  # the first one
        self._first: dict[int, float] = {}  # when each came first

    def install(self) -> None:
        """Catch the signals from now on. Once, in the main thread."""
        if signal.getsignal(signal.SIGUSR1) is _caught:
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _caught)
        sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
        orphaned = follow_launcher()
        threading.Thread(target=self._listen, args=(reader, orphaned), daemon=True, name="signals").start()

    def heard(self, number: int, now: float) -> bool:
        """Note a signal; True where it says: at once."""
        if number not in STOP_SIGNALS:
            return False
        if number in self._first:
            return number not in ONCE and now - self._first[number] >= REPEAT_S
        self._first[number] = now
        self.asked = self.asked or signal.Signals(number)
        return False

    def _listen(self, reader: int, orphaned: Callable[[], bool]) -> None:
        while True:
            ready, _, _ = select.select([reader], [], [], 1.0)
            told = self.asked
            if told is None and orphaned():
                self.heard(signal.SIGTERM, time.monotonic())
            for number in os.read(reader, 64) if ready else b"":
                if self.heard(number, time.monotonic()):
                    _say(f"{signal.Signals(number).name} again: ends at once, the last commit stands")
                    os._exit(128 + number)
            if self.asked is not told and self.asked is not None:
                _say(f"{self.asked.name}: stops after this step, saved; the same signal again: at once")


def follow_launcher() -> Callable[[], bool]:
    """Stop well where the launcher dies; returns whether deepspeed's runner, the launcher's parent, has died.

    The kernel sends SIGTERM when the launcher ends. `kill DEEPSPEED` ends only its runner: without a look at it
    the launcher and the ranks would go on unseen.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in LAUNCHED.values()):
        return lambda: False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    launcher = os.getppid()
    runner = parent(launcher)
    return lambda: LAUNCHED["deepspeed"] in os.environ and parent(launcher) != runner


class _Outlet(io.FileIO):
    """A stream that may lose its reader: a closed terminal, or the `tee` that Ctrl-C ends too. The run goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in NOBODY:
                raise
            return len(data)


def _lasting(stream: Any) -> Any:
    """This process's own stream as one that outlives its reader; another, such as a test's, as it is."""
    try:
        own = isinstance(stream, io.TextIOWrapper) and stream.fileno() in (1, 2)
    except io.UnsupportedOperation:
        own = False
    if not own:
        return stream
    stream.flush()
    outlet = io.BufferedWriter(_Outlet(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(outlet, stream.encoding, stream.errors, line_buffering=True)


def _caught(number: int, frame: object) -> None:
    """Nothing: the thread hears of it. What the main thread was doing goes on."""


def _say(text: str) -> None:
    if is_first():
        print(f"glide_ds: {text}", file=sys.stderr, flush=True)


SIGNALS = StopSignals()
