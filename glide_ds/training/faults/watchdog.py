"""Where every rank is, and a watchdog that ends all ranks together when one is late, fails or is gone.

The training loop sets marks (`Watch.at`). A thread of each rank posts them once a second on a board: the TCP
store that the ranks met at, over a connection of its own, so it works while the main thread waits in a
collective. A store rather than files in the run directory: files over NFS are seen seconds to a minute late.
Only rank 0 reads all ranks' posts (512 small values a second); the others read rank 0's, and judge in its
place when it is silent.

- No rank moves for `run.hang_s`: each writes the stacks of its threads and of its loader's workers to
  RUN/hang/rankN.txt, one says who is late, all end with EXIT_LOST. The marks come in the same order on all
  ranks, so a late rank is one with the fewest; the others wait for it in a collective.
- One rank raises: it posts that as the first cause, says it once, and all ranks end with its exit code.
- A rank is gone (killed, a cut network, a time-out): those left say so in one line and end with EXIT_LOST.

A rank whose threads can't run (stopped, or in a C call that holds Python's lock) is named as silent and killed
by a neighbour on its host; faulthandler's timer, which needs no lock, has told its stacks on stderr by then. A
process that was suspended is not late: time counts only while the watchdog itself runs.

Exit codes pass through torchrun and srun; deepspeed's runner reports 0 for a launcher killed by a signal, so
scripts should rather look for RUN/STOPPED.json and the last commit.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from glide_ds.config import RunConfig
from glide_ds.data.workers import stacks_of
from glide_ds.errors import EXIT_LOST, GlideError
from glide_ds.masking import masked
from glide_ds.training.faults.failures import brief, is_lost_peer
from glide_ds.training.faults.last_word import last_word

T = TypeVar("T")

SET_UP = "set-up"  # outside the training loop: downloads and index files may take long
TICK_S = 1.0
SILENT_S = 5.0  # without a post, a rank counts as silent
PATIENCE_S = 3.0  # for the first cause of a lost connection, and for the others to leave
STDERR = 2  # the file's number: sys.stderr may be a stand-in
SHOWN = 8  # late ranks described one by one


class Watch:
    """This rank's progress marks: cheap to set, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.mark, self.step = SET_UP, 0
        self.count = 0  # marks passed: the same sequence on all ranks
        self.micro, self._reading = 0, -1  # batches read of this global batch
        self.beats = 0  # signs of life that only some ranks give
        self.collective, self.collectives = "", 0  # DeepSpeed's that was begun last, and how many were
        self.begins = threading.Event()  # set-up is over, and with it the patience for it

    def at(self, mark: str, step: int) -> None:
        """This rank now begins `mark` (data, forward, backward, step, log, save, sample, validate)."""
        if mark == "data":
            self.micro = self.micro + 1 if step == self._reading else 1
            self._reading = step
        begins = self.mark == SET_UP != mark
        self.mark, self.step = mark, step
        self.count += 1
        if begins:
            self.begins.set()

    def calls(self, collective: str) -> None:
        """This rank now calls one of DeepSpeed's collectives."""
        self.collective = collective
        self.collectives += 1

    def beat(self) -> None:
        """A sign of life within a long mark, on this rank alone."""
        self.beats += 1

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a sign of life for each."""
        for item in items:
            self.beat()
            yield item


class Post(NamedTuple):
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    number: int  # of the post
    mark: str
    step: int  # updates done when the mark began
    micro: int  # batches read of the global batch
    passed: int  # marks
    quiet: float  # seconds since the last mark or beat
    collective: str = ""  # begun last
    collectives: int = 0  # begun so far

    def describe(self) -> str:
        batch = f", batch {self.micro} of global batch {self.step}" if self.mark == "data" else ""
        where = f"{self.mark!r} after step {self.step}{batch}{self.last_collective()}"
        return f"rank {self.rank} ({self.host}, pid {self.pid}) in {where}"

    def last_collective(self) -> str:
        return f", last collective {self.collective} (number {self.collectives})" if self.collective else ""


class Cause(NamedTuple):
    """Why all ranks end: the first one posted."""

    rank: int
    exit_code: int
    hang: bool = False
    silent: Sequence[tuple[str, int]] = ()  # host and process of the ranks that can't end by themselves


def late_posts(posts: Sequence[Post]) -> list[Post]:
    """Of the ranks that passed the fewest marks; none where all passed the same."""
    counts = [post.passed for post in posts]
    if len(posts) > 1 and min(counts) == max(counts):
        return []
    return [post for post in posts if post.passed == min(counts)]


def describe_hang(
    posts: Sequence[Post], silent: set[int], where: Mapping[int, str], limit_s: float, folder: Path
) -> str:
    """Who is late, where it is, and what the others wait in."""
    late = [post for post in posts if post.rank in silent] or late_posts(posts)
    named = ", ".join(f"rank {post.rank}" for post in late[:SHOWN]) + (", …" if len(late) > SHOWN else "")
    lines = [f"no rank has moved for {limit_s:g} s (run.hang_s); late: {named or 'none before the others'}"]
    for post in late[:SHOWN]:
        lines.append(f"  {post.describe()} for {post.quiet:.0f} s")
        if post.rank in silent:
            lines.append("    does not answer: stopped, or a C call holds Python's lock; it is killed")
        elif post.rank in where:
            lines.append(f"    {where[post.rank]}")
    marks: dict[tuple[str, int, str], list[int]] = {}
    for post in posts:
        if post not in late:
            marks.setdefault((post.mark, post.step, post.last_collective()), []).append(post.rank)
    for (mark, step, last), ranks in marks.items():
        shown = ", ".join(map(str, ranks[:SHOWN])) + (", …" if len(ranks) > SHOWN else "")
        lines.append(f"  {len(ranks)} waiting in {mark!r} after step {step}{last}: rank {shown}")
    lines.append(f"  stacks: {folder}/rank*.txt. All ranks end with code {EXIT_LOST}; the same command goes on")
    return "\n".join(lines)


def hang_limit(config: RunConfig) -> float:
    """Seconds without a move on any rank that count as a hang."""
    return config.hang_s or config.timeout_s / 2


@contextmanager
def guarded(watch: Watch, config: RunConfig) -> Iterator[None]:
    """Around all work of the ranks: whatever happens to one of them, all end. Collective."""
    dog = Watchdog(watch, Path(config.dir) / "hang", hang_limit(config))
    dog.start()
    try:
        yield
    except Exception as error:
        dog.fail(error)
        raise
    finally:
        dog.close()
    dist.barrier()  # rank 0, which may keep the board, leaves when all watchdogs are at rest


class Watchdog:
    """One rank's watchdog. Made by all ranks alike."""

    def __init__(self, watch: Watch, folder: Path, hang_s: float) -> None:
        self.watch, self.folder, self.hang_s = watch, folder, hang_s
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host = socket.gethostname()
        self.clock = 0.0  # seconds that this watchdog has been running
        self._moved, self._seen_count = 0.0, (-1, -1)
        self._number = 0
        self._heard: dict[int, tuple[int, float]] = {}  # each rank's newest post, and when it came
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=10),
        )
        self.board = dist.PrefixStore(f"watchdog-{names[0]}", store)
        self._post()
        dist.barrier()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self.watch.begins.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def fail(self, error: Exception) -> None:
        """End all ranks because of `error`; returns only where every rank raises the same, or there is but one."""
        if self.world == 1 or getattr(error, "on_all_ranks", False):
            return
        if is_lost_peer(error):
            gone = self._gone()  # takes a while, in which another rank's cause may end this one
            self._end(
                Cause(self.rank, EXIT_LOST),
                f"rank {self.rank} lost its peers in {self.watch.mark!r} after step {self.watch.step}"
                f"{gone}: {brief(error)}",
            )
        where = f"rank {self.rank} failed in {self.watch.mark!r} after step {self.watch.step}"
        if isinstance(error, GlideError):
            self._end(Cause(self.rank, error.exit_code), f"rank {self.rank}: {type(error).__name__}: {error}")
        told = masked("".join(traceback.format_exception(error)))
        self._end(Cause(self.rank, 1), f"{where}, and all ranks end with it:\n{told}")

    # ---- the thread

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            # A rank that stands still in its first second must not be taken for one that is setting up.
            self.watch.begins.wait(TICK_S)
            self.watch.begins.clear()
            if self._closed.is_set():
                return
            now = time.monotonic()
            self.clock += min(now - before, 2 * TICK_S)  # not while suspended
            before = now
            if self.watch.mark == SET_UP:  # imports may hold the lock for seconds
                faulthandler.cancel_dump_traceback_later()
            else:  # fires only where this thread can't run for long
                faulthandler.dump_traceback_later(max(2 * TICK_S, 0.8 * self.hang_s), file=STDERR)
            try:
                self._tick()
            except (dist.DistError, RuntimeError) as error:
                self._end(
                    Cause(self.rank, EXIT_LOST),
                    f"rank {self.rank} can't reach rank 0's store, so rank 0 or the network is gone: {brief(error)}",
                    alone=True,
                )

    def _tick(self) -> None:
        self._post()
        if self.board.check(["cause"]):
            self._follow()
        chief = self._read([0])[0]
        if self.rank == 0 or self._silence(chief) > self.hang_s:
            self._judge()

    def _post(self) -> None:
        seen = (self.watch.count, self.watch.beats)
        if seen != self._seen_count:
            self._seen_count, self._moved = seen, self.clock
        self._number += 1
        watch = self.watch
        post = Post(
            self.rank,
            self.host,
            os.getpid(),
            self._number,
            watch.mark,
            watch.step,
            watch.micro,
            watch.count,
            self.clock - self._moved,
            watch.collective,
            watch.collectives,
        )
        self.board.set(f"rank{self.rank}", json.dumps(post))

    def _read(self, ranks: Sequence[int]) -> list[Post]:
        posts = [Post(*json.loads(text)) for text in self.board.multi_get([f"rank{rank}" for rank in ranks])]
        for post in posts:
            if self._heard.get(post.rank, (0, 0.0))[0] != post.number:
                self._heard[post.rank] = (post.number, self.clock)
        return posts

    def _silence(self, post: Post) -> float:
        return self.clock - self._heard[post.rank][1]

    def _judge(self) -> None:
        """End all ranks if none moves."""
        posts = [
            post._replace(quiet=post.quiet + self._silence(post)) for post in self._read(range(self.world))
        ]
        if any(post.mark == SET_UP for post in posts) or min(post.quiet for post in posts) <= self.hang_s:
            return
        silent = [post for post in posts if self._silence(post) > SILENT_S]
        cause = Cause(self.rank, EXIT_LOST, True, [(post.host, post.pid) for post in silent])
        with self._ending:
            if self._first(cause).rank != self.rank:
                return  # the next tick follows it
            self._write_stacks()
            self._await("arrived", self.world - len(silent))
            ranks = [post.rank for post in posts if self.board.check([f"where{post.rank}"])]
            where = {rank: self.board.get(f"where{rank}").decode() for rank in ranks}
            _say(describe_hang(posts, {post.rank for post in silent}, where, self.hang_s, self.folder))
            self._leave(cause)

    # ---- the end

    def _first(self, cause: Cause) -> Cause:
        """The cause that all ranks end by: this one, unless another was there before."""
        told = json.loads(self.board.compare_set("cause", "", json.dumps(cause)))
        return Cause(*told)

    def _end(self, cause: Cause, text: str, *, alone: bool = False) -> NoReturn:
        """End with `cause`, or with the one that was there before; `alone` where the board is gone."""
        with self._ending:
            first = cause
            with suppress(dist.DistError, RuntimeError):
                first = cause if alone else self._first(cause)
            if first.rank == self.rank:
                _say(text)
            self._leave(first, alone=alone)

    def _follow(self) -> None:
        with self._ending:
            cause = Cause(*json.loads(self.board.get("cause")))
            if cause.hang:
                self._write_stacks()
            self._leave(cause)

    def _leave(self, cause: Cause, *, alone: bool = False) -> NoReturn:
        """End this process and its workers; rank 0, which may keep the board, as the last."""
        if not alone:
            with suppress(dist.DistError, RuntimeError):  # the board may have gone with rank 0
                self.board.add("left", 1)
                if self.rank == 0:
                    self._await("left", self.world - len(cause.silent))
        for host, pid in cause.silent:
            if host == self.host:
                _kill(pid)
        for child in multiprocessing.active_children():
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(cause.exit_code)

    def _await(self, counter: str, wanted: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while self.board.add(counter, 0) < wanted and time.monotonic() < until:
            time.sleep(0.05)

    def _gone(self) -> str:
        """The ranks that post nothing for a while."""
        try:
            before = self._read(range(self.world))
            time.sleep(PATIENCE_S)
            after = self._read(range(self.world))
        except (dist.DistError, RuntimeError):
            return ""
        gone = [str(old.rank) for old, new in zip(before, after, strict=True) if old.number == new.number]
        return f" (rank {', '.join(gone[:SHOWN])} is gone)" if gone else ""

    def _write_stacks(self) -> None:
        """Tell where this rank is: all in RUN/hang/rankN.txt, the innermost frames on the board."""
        with suppress(OSError):  # a full disk must not keep the run from ending
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank{self.rank}.txt").open("w", encoding="utf-8") as file:
                self._tell_all(file)
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        inner = traceback.extract_stack(frame)[:-4:-1]
        told = " ← ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in inner)
        self.board.set(f"where{self.rank}", told)
        self.board.add("arrived", 1)

    def _tell_all(self, file: IO[str]) -> None:
        """The mark and data position, every thread's stack, the loader workers' stacks."""
        (post,) = self._read([self.rank])
        print(f"{post.describe()} for {post.quiet:.0f} s\n", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
        for child in multiprocessing.active_children():
            stacks = stacks_of(child.pid or 0) or "no answer"
            print(f"\nloader worker {child.name}, pid {child.pid}:\n{stacks}", file=file)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, signal.SIGKILL)


def _say(text: str) -> None:
    last_word(f"glide_ds: {text}")
