"""The one way to say how far something is, how fast it goes and how long it still takes.

On a terminal tqdm draws a bar; elsewhere there is a line every few seconds. What begins is said by who begins it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from glide_ds.masking import masked

T = TypeVar("T")
LINE_S = 5.0  # between two lines where there is no bar
IN_PLACE_S = 0.1


class Progress:
    """How far `what` is, counted in `unit`s of which there are `total`, where that is known.

    `scaled` writes large counts short (12.3M), for bytes. `every_s` is the time between two lines where no bar is
    drawn; None leaves the lines to the caller. With `shown` off it only counts: on ranks other than 0.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        shown: bool = True,
        scaled: bool = False,
        every_s: float | None = LINE_S,
        stream: TextIO | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.shown, self.scaled, self.stream = shown, scaled, stream or sys.stdout
        self.first = self.done = done
        self.note = ""
        self.started = self.told = time.monotonic()
        self.bar: Any = None
        if shown and self.stream.isatty():
            self.bar = tqdm(
                desc=what,
                total=total,
                initial=done,
                unit=unit or "it",
                unit_scale=scaled,
                file=self.stream,
                dynamic_ncols=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` stands behind the figures."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif self.shown and self.every_s is not None and time.monotonic() - self.told >= self.every_s:
            self.told = time.monotonic()
            self.line(self.describe())

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each counted once it is done with. A total that is not known yet is theirs."""
        if self.total is None and isinstance(items, Sized):
            self.total = len(items)
            if self.bar is not None:
                self.bar.total = self.total
        for item in items:
            yield item
            self.advance()

    def line(self, text: str) -> None:
        """A line of its own, above the bar where there is one. Secrets are masked."""
        if self.shown:
            tqdm.write(masked(text), file=self.stream)
            self.stream.flush()

    def describe(self) -> str:
        """What, how far, how fast, how long still: one line."""
        unit = f" {self.unit}" if self.unit else ""
        whole = f"/{self._number(self.total)}" if self.total is not None else ""
        parts = [f"{self.what} {self._number(self.done)}{whole}{unit}"]
        seconds, made = time.monotonic() - self.started, self.done - self.first
        if made and seconds > 0:
            rate = made / seconds
            parts.append(f"{self._number(rate)}{unit}/s")
            if self.total is not None:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts) + (f"  {self.note}" if self.note else "")

    def left_s(self) -> float:
        """Seconds still to go at the rate so far; infinite where nothing is done yet or no total is known."""
        made = self.done - self.first
        if not made or self.total is None:
            return float("inf")
        return (time.monotonic() - self.started) / made * (self.total - self.done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _number(self, value: float) -> str:
        if self.scaled:
            return str(tqdm.format_sizeof(value))
        return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


class Status:
    """What is being done now, where nothing can be counted: in place on a terminal, elsewhere a line now and then."""

    def __init__(self, *, shown: bool = True, in_place: bool = False, stream: TextIO | None = None) -> None:
        self.shown, self.in_place, self.stream = shown, in_place, stream or sys.stdout
        self.told = time.monotonic()

    def say(self, text: str) -> None:
        """Told if it is time; the next thing said takes its place."""
        now = time.monotonic()
        if not self.shown or now - self.told < (IN_PLACE_S if self.in_place else LINE_S):
            return
        self.told = now
        room = columns() - 10
        self.stream.write(f"\r  …    {text:<{room}.{room}}" if self.in_place else f"  …    {text}\n")
        self.stream.flush()


def told(what: str, unit: str = "", **options: Any) -> Callable[[Iterable[T]], Iterator[T]]:
    """A function that goes over items and says how far it is."""

    def over(items: Iterable[T]) -> Iterator[T]:
        with Progress(what, unit=unit, **options) as progress:
            yield from progress.over(items)

    return over


def columns(least: int = 60, most: int = 100) -> int:
    """How wide what is printed may be: the terminal, within these bounds; `most` where there is none."""
    return min(most, max(least, shutil.get_terminal_size((most, 24)).columns)) if sys.stdout.isatty() else most


def coloured(text: str, code: int = 33) -> str:
    """In that colour (ANSI; yellow: a warning) where stdout is a terminal that has colours and none are refused."""
    refused = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if refused or not sys.stdout.isatty() else f"\033[{code}m{text}\033[0m"


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.02 s, 42 s, 3 min 20 s, 5 h 12 min, 12 days 3 h."""
    whole = round(seconds)
    if 0 < seconds < 1:
        return f"{seconds:.1g} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 100 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400:,} days {whole % 86400 // 3600} h"
