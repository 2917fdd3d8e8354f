"""What can go wrong, and the exit codes that tell it to scripts. Imports nothing slow: a command answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from glide_ds.masking import masked

# Exit codes of a command; any other is a crash. 0: done, or stopped well (RUN/STOPPED.json says which).
EXIT_MISTAKE = 2  # a GlideError: a person must mend something
EXIT_UNSTABLE = 3  # the stability guard gave up, with a report: starting again would not help
EXIT_LOST = 75  # a hang, a peer that is gone, a disk or network that fails: start the same command again


class Fault(NamedTuple):
    """One thing that is wrong: what is the case, with the values; what follows from it; what a person can do."""

    fact: str
    consequence: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        told = f"{self.fact}, so {self.consequence}" if self.consequence else self.fact
        return f"{told}; {self.remedy}" if self.remedy else told


class GlideError(Exception):
    """A mistake a person can mend: fact, consequence and remedy as fields. It reads "fact, so consequence; remedy".

    Secrets in them are masked.
    """

    on_all_ranks = False  # True where every rank raises the same one, so that one of them need say it
    exit_code = EXIT_MISTAKE

    def __init__(self, fact: str, consequence: str = "", remedy: str = "") -> None:
        fault = Fault(masked(fact), masked(consequence), masked(remedy))
        super().__init__(*fault)
        self.faults: tuple[Fault, ...] = (fault,)

    @classmethod
    def all_of(cls, faults: Sequence[Fault]) -> Self:
        """One error of several faults, each on a line of its own."""
        error = cls(*faults[0])
        error.faults = tuple(Fault(*map(masked, fault)) for fault in faults)
        return error

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return str(self.faults[0])
        return "\n".join([f"{len(self.faults)} mistakes:", *(f"- {fault}" for fault in self.faults)])


class ConfigError(GlideError):
    """The run's configuration is wrong or contradicts itself."""


class DataError(GlideError):
    """Shards, captions or embeddings are missing, damaged or do not fit."""


class WeightsError(GlideError):
    """A weight file is missing, damaged or belongs to another model."""


class CheckpointError(GlideError):
    """No checkpoint can be written, found or trusted."""


class UnstableError(GlideError):
    """The training went wrong in a way that rolling back does not mend; RUN/stopped-report.json says how."""

    exit_code = EXIT_UNSTABLE


class SurroundingsError(GlideError):
    """A disk, a mount, a cache or the network fails under a run that was right when it started."""

    exit_code = EXIT_LOST


class LostError(GlideError):
    """A rank hangs or is gone."""

    exit_code = EXIT_LOST
