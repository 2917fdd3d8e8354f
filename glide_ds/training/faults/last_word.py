"""The last line of the terminal: what became of the run, said again where a launcher talks after it.

Ended by a signal or an error, deepspeed's launcher adds four lines of its own and torchrun a traceback. No torch in
here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LAUNCHERS = ("deepspeed", "torchrun", "deepspeed.launcher.launch", "torch.distributed.run")
# Waits for the launcher, then for the one that started it, and speaks. An orphan in a session of its own: launchers
# end all that is below them.
_SPEAKER = """
import os, select, signal, sys
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in map(int, sys.argv[2:]):
    try:
        select.select([os.pidfd_open(pid)], [], [], 60)
    except OSError:
        pass
try:
    print(sys.argv[1], file=sys.stderr, flush=True)
except OSError:
    pass
"""


def last_word(text: str) -> None:
    """Print `text` on stderr, and once more when the launcher that may follow it with lines of its own has ended."""
    print(text, file=sys.stderr, flush=True)
    if pids := launchers():
        command = [sys.executable, "-I", "-S", "-c", _SPEAKER, text, *map(str, pids)]
        subprocess.run(command, start_new_session=True, stdin=subprocess.DEVNULL, check=False)


def launchers() -> list[int]:
    """The launcher that is this process's parent, and the process that started it where that is one too; Linux only."""
    found: list[int] = []
    pid = os.getppid()
    while sys.platform == "linux" and not _command(pid).isdisjoint(LAUNCHERS):
        found.append(pid)
        pid = parent(pid)
    return found


def parent(pid: int) -> int:
    """The parent's process id; 0 where the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> set[str]:
    """The names in the first words of its command line: the interpreter, its options, the launcher."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return set()
    return {os.path.basename(word).decode(errors="replace") for word in words[:4]}
