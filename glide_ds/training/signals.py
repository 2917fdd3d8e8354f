"""The signals that ask a run to stop, caught before anything slow is imported (no torch in here).

SIGINT (Ctrl-C), SIGTERM and SIGUSR1 ask for a stop at the next step (stopping.py). The same signal again,
REPEAT_S or more later, ends the process at once with code 128 + number; the last commit stands. What comes
sooner, or is another signal, is the same request: torchrun hands a Ctrl-C on to ranks that the terminal has
told already, and the deepspeed launcher follows it with SIGTERM.

Python runs a signal's handler in the main thread, between two bytecodes: not while it waits in a collective.
So a thread of its own reads the numbers from a pipe that Python fills the moment a signal comes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

REPEAT_S = 2.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
        threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()
        for number in STOP_SIGNALS:
            signal.signal(number, _caught)

    def heard(self, number: int, now: float) -> bool:
        """Note a signal; True where it says: at once."""
        if number not in STOP_SIGNALS:
            return False
        if number in self._first:
            return now - self._first[number] >= REPEAT_S
        self._first[number] = now
        self.asked = self.asked or signal.Signals(number)
        return False

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                told = self.asked
                if self.heard(number, time.monotonic()):
                    _say(f"{signal.Signals(number).name} again: ends at once, the last commit stands")
                    os._exit(128 + number)
                if self.asked is not told and self.asked is not None:
                    _say(f"{self.asked.name}: stops after this step, saved; the same signal again: at once")


def _caught(number: int, frame: object) -> None:
    """Nothing: the thread hears of it. What the main thread was doing goes on."""


def _say(text: str) -> None:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"glide_ds: {text}", file=sys.stderr, flush=True)


SIGNALS = StopSignals()
