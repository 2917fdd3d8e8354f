"""Worker processes and signals.

A signal to a whole job reaches the workers too: Ctrl-C goes to the terminal's process group, Slurm and the
deepspeed launcher signal every process below them. A run that stops well takes one more step and needs its
workers for it. So a worker hears nobody but its own trainer, and ends with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_STACKS = "glide_ds-stacks"  # the name of the file in memory that a worker writes its stacks to


def heed_the_trainer(worker: int) -> None:
    """A DataLoader's worker_init_fn: ignore the job's signals, end with the trainer, tell the stacks on SIGUSR2."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "linux":
        return  # what follows has no counterpart elsewhere; torch's own checks end the workers within seconds
    trainer = os.getppid()
    end_with(trainer)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_the_trainers_word, args=(trainer,), daemon=True).start()
    faulthandler.register(signal.SIGUSR2, file=os.memfd_create(_STACKS), all_threads=True)


def end_with(parent: int) -> None:
    """On Linux, be killed when the parent is gone: a pool's workers would wait for their next task for ever."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it died before this was set


def stacks_of(worker: int) -> str:
    """What every thread of the worker process is doing; "" where it can't say."""
    try:
        files = [f"/proc/{worker}/fd/{name}" for name in os.listdir(f"/proc/{worker}/fd")]
        (memory,) = [file for file in files if _STACKS in os.readlink(file)]
        os.kill(worker, signal.SIGUSR2)
        time.sleep(0.2)
        with open(memory, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):  # ended, not of this kind, or not on Linux
        return ""


def _end_at_the_trainers_word(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
