"""A run in Weights & Biases, written from its metrics.jsonl.

Line N of metrics.jsonl is step N there, and a start sends all lines that the file still has. A run in the cloud knows
how many it was sent and leaves those out; offline they are written anew, in the place of what earlier starts wrote. So
each logged update is there once, whatever a kill has cut short, and what a rollback undid stays, as in metrics.jsonl:
`rollbacks` tells it apart. A line is sent once the next one is there, for its sample grid is drawn after it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from glide_ds.config import Config
from glide_ds.errors import ConfigError
from glide_ds.training.checkpoint.start import read_run


def check_installed(config: Config) -> None:
    """Raises ConfigError where the run is to be shown there and wandb is not installed."""
    project = config.log.wandb.project
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb.project = {project!r} and wandb is not installed",
            "the run can't be shown there",
            "run: bash launch/env.sh --extras wandb, or remove it",
        )


def arguments(config: Config, run: str) -> dict[str, Any]:
    """What wandb.init is given for the run of that id. Secrets are masked."""
    options, folder = config.log.wandb, Path(config.run.dir)
    return {
        "project": options.project,
        "name": options.name or folder.resolve().name,
        "mode": options.mode,
        "dir": str(folder),
        "id": run,
        "resume": "allow" if options.mode == "online" else None,  # offline there is nothing to go on from
        "config": {config.train.phase: config.to_json()},
    }


class Wandb:
    """The run there, while one phase trains. `lines`: those that metrics.jsonl has."""

    def __init__(self, config: Config, lines: Iterable[str], say: Callable[[str], None] = print) -> None:
        import wandb

        self.folder, self.image = Path(config.run.dir), wandb.Image
        own = read_run(self.folder)["run"]
        if config.log.wandb.mode == "offline":
            self._make_room(own, say)
        # Its terminal output is a person's own, and the repository is not the run's.
        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        try:
            self.run = wandb.init(**arguments(config, own), settings=settings)
        except wandb.Error as error:
            raise ConfigError(
                f"log.wandb.project = {config.log.wandb.project!r}: {error}",
                "the run can't be shown there",
                "run `wandb login`, or set log.wandb.mode=offline, or remove it",
            ) from error
        self.waiting: Mapping[str, Any] | None = None
        self.sent, self.there = 0, self.run.step
        self.defined: set[str] = set()
        for line in lines:
            self.line(json.loads(line))

    def line(self, values: Mapping[str, Any]) -> None:
        """The next line of metrics.jsonl."""
        self._send()
        self.waiting = values

    def close(self) -> None:
        self._send()
        self.run.finish()

    def _send(self) -> None:
        values, self.waiting = self.waiting, None
        if values is None:
            return
        number, self.sent = self.sent, self.sent + 1
        if number < self.there:
            return
        phase, step = values["phase"], values["step"]
        if phase not in self.defined:
            self.defined.add(phase)
            self.run.define_metric(f"{phase}/step")
            self.run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        named = {f"{phase}/{name}": value for name, value in numbers(values)}
        grid = self.folder / "samples" / f"{phase}-{step:08d}.png"
        pictures = {f"{phase}/samples": self.image(str(grid))} if grid.exists() else {}
        self.run.log({**named, **pictures}, step=number)

    def _make_room(self, own: str, say: Callable[[str], None]) -> None:
        """Remove what earlier starts wrote offline: this one writes it again, and `wandb sync` would send both."""
        for left in sorted(self.folder.glob(f"wandb/offline-run-*-{own}")):
            shutil.rmtree(left)
            say(f"removed {left}: its lines are written again")


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """The numbers of a line by name, those of what it nests as outer/inner."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value
