"""What the checks look at, and what a check gives back."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from glide_ds.config import Config
from glide_ds.errors import Fault, GlideError
from glide_ds.progress import Status


class Finding(NamedTuple):
    """What a check saw. It passes where it found no fault; `skipped` says that it did not apply."""

    text: str
    faults: tuple[Fault, ...] = ()
    skipped: bool = False


def failed(fact: str, remedy: str) -> Finding:
    """What a check saw where that is itself the fault."""
    return Finding(fact, (Fault(fact, remedy=remedy),))


class BlockedError(Exception):
    """A check can't look before what another one found is mended; the message names that one."""


def faults_of(error: Exception) -> tuple[Fault, ...]:
    """What an error says is wrong."""
    if isinstance(error, GlideError):
        return error.faults
    return (Fault(str(error), remedy="check the path, its permissions and the free space"),)


@dataclass
class Site:
    """The run to be checked and the process that checks it."""

    configs: Sequence[Config]
    nodes: int
    gpus: int  # ranks per node
    hostfile: Path | None = None
    samples: int = 64
    take_step: bool = True
    rank: int = 0
    ranks: int = 1  # that check together: those of the launcher, or this process alone
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    terminal: bool = False
    status: Status = field(init=False)

    def __post_init__(self) -> None:
        self.status = Status(shown=self.rank == 0, in_place=self.terminal)

    @property
    def config(self) -> Config:
        """The first phase: what is checked once is checked for it."""
        return self.configs[0]

    @property
    def world_size(self) -> int:
        """Ranks of the run itself."""
        return self.nodes * self.gpus

    @property
    def host(self) -> str:
        return socket.gethostname()

    def progress(self, text: str) -> None:
        """Say where a long check is."""
        self.status.say(text)
