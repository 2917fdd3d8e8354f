"""What a run directory tells of its run, whether that goes on, was killed or never began. Reads only."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from glide_ds.config import Config
from glide_ds.config.load import recorded
from glide_ds.config.phases import PHASES
from glide_ds.errors import ConfigError
from glide_ds.training.checkpoint.commit import Owner
from glide_ds.training.checkpoint.start import RUN_FILE, read_run
from glide_ds.training.faults.lease import holder
from glide_ds.training.faults.stopping import MARKER
from glide_ds.training.logging import STARTS_FILE
from glide_ds.training.stability import REPORT_FILE, SKIPPED_FILE


@dataclass
class JsonRecords:
    """The objects of a file of JSON lines, and how many lines were none."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    torn: bool = False  # its last line was cut short by a kill, or is being written
    damaged: int = 0  # other lines that are no JSON objects

    @classmethod
    def read(cls, path: Path) -> JsonRecords:
        """Of a file that is not there: none. Raises OSError where it can't be read."""
        found = cls()
        if not path.exists():
            return found
        with path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                if isinstance(value, dict):
                    found.lines.append(value)
                elif line.endswith(b"\n"):
                    found.damaged += 1
                else:
                    found.torn = True
        return found


@dataclass
class RunRecord:
    """A run directory, read when it is asked."""

    path: Path
    problems: list[str] = field(default_factory=list)  # of files that are there and can't be read

    @classmethod
    def open(cls, path: Path) -> RunRecord:
        """Raises ConfigError where the folder is no run directory, or its run.json can't be read."""
        if not (path / RUN_FILE).is_file():
            near = [str(found.parent) for found in sorted(path.glob(f"*/{RUN_FILE}"))] if path.is_dir() else []
            raise ConfigError(
                f"{path} is no run directory ({f'it holds no {RUN_FILE}' if path.is_dir() else 'no such folder'})",
                remedy=f"give one of {', '.join(near[:5])}" if near else "give the run.dir of a training",
            )
        record = cls(path)
        _ = record.whole  # can be read
        return record

    @cached_property
    def whole(self) -> dict[str, Any]:
        """run.json."""
        return read_run(self.path)

    @property
    def owner(self) -> Owner | None:
        """Whose checkpoints are the run's own; None for a run of before there were ids."""
        return Owner(self.whole["run"], bool(self.whole.get("older"))) if "run" in self.whole else None

    @property
    def phases(self) -> list[str]:
        """The phases that were started, in their order."""
        return [name for name in PHASES if name in self.whole.get("phases", {})]

    def document(self, phase: str) -> dict[str, Any]:
        """The phase's configuration as it was last started, as JSON."""
        return dict(self.whole["phases"][phase])

    def block(self, phase: str, section: str) -> Mapping[str, Any]:
        """One section of our block in it; empty where an earlier version wrote none."""
        return dict(self.document(phase).get("glide_ds", {}).get(section, {}))

    def config(self, phase: str) -> Config:
        """The same, checked. Raises ConfigError where this version can't read it."""
        return recorded(str(self.path / RUN_FILE), self.document(phase))

    @cached_property
    def metrics(self) -> JsonRecords:
        """metrics.jsonl, without what a rollback undid."""
        return JsonRecords.read(self.path / "metrics.jsonl")

    @cached_property
    def skipped(self) -> JsonRecords:
        """skipped.jsonl: updates that were skipped, and rollbacks."""
        return JsonRecords.read(self.path / SKIPPED_FILE)

    @cached_property
    def starts(self) -> JsonRecords:
        """starts.jsonl: every start of a phase, from which step, on what."""
        return JsonRecords.read(self.path / STARTS_FILE)

    def of_phase(self, phase: str) -> list[dict[str, Any]]:
        """Its lines of metrics.jsonl, in the order in which they were written."""
        return [line for line in self.metrics.lines if line.get("phase") == phase]

    def data_report(self, phase: str) -> dict[str, Any]:
        return self._json(f"data-{phase}.json")

    @property
    def stopped(self) -> dict[str, Any]:
        """Why it was stopped well, with the phase and step; empty where it was not."""
        return self._json(MARKER)

    @property
    def gave_up(self) -> dict[str, Any]:
        """The stability guard's report, where it ended the run."""
        return self._json(REPORT_FILE)

    @property
    def running(self) -> dict[str, Any] | None:
        """Host, process and since when, where a process holds the directory now."""
        return holder(self.path)

    @property
    def last_written(self) -> datetime.datetime | None:
        """When metrics.jsonl last grew."""
        with suppress(OSError):
            seconds = (self.path / "metrics.jsonl").stat().st_mtime
            return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
        return None

    def grids(self, phase: str) -> Iterator[tuple[int, Path]]:
        """(step, picture) of its sample grids, by step."""
        for path in sorted((self.path / "samples").glob(f"{phase}-*.png")):
            number = path.stem.removeprefix(f"{phase}-")
            if number.isdecimal():
                yield int(number), path

    def _json(self, name: str) -> dict[str, Any]:
        """A file that is written all or nothing; empty where there is none, or none that can be read."""
        try:
            return dict(json.loads((self.path / name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            self.problems.append(f"{name} can't be read ({error})")
            return {}
