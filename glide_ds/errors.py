"""What can go wrong, and the exit codes that tell it to scripts. Imports nothing, so that a command answers at once."""

from __future__ import annotations

# Exit codes of a command; any other is a crash. 0: done, or stopped well (RUN/STOPPED.json says which).
EXIT_MISTAKE = 2  # a GlideError: a person must mend something
EXIT_UNSTABLE = 3  # the stability guard gave up, with a report: starting again would not help
EXIT_LOST = 75  # a hang, or a peer that is gone: start the same command again


class GlideError(Exception):
    """A mistake a person can mend. The message states fact, consequence and remedy, with the values."""

    on_all_ranks = False  # True where every rank raises the same one, so that one of them need say it
    exit_code = EXIT_MISTAKE


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


class LostError(GlideError):
    """A rank hangs or is gone."""

    exit_code = EXIT_LOST
