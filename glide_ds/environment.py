"""What a launcher says of this process, in its environment. Imports nothing slow."""

from __future__ import annotations

import os
import socket

from glide_ds.errors import ConfigError

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def read_environment() -> tuple[int, int]:
    """(rank, world size) from the launcher's variables; a plain `python` start is one rank of one.

    Fills in what torch.distributed reads: RANK, WORLD_SIZE, LOCAL_RANK (from Slurm's names under
    `srun`), MASTER_ADDR and MASTER_PORT for a single process.
    """
    if "RANK" not in os.environ and is_launched():
        os.environ.update({name: os.environ[slurm] for name, slurm in SLURM_NAMES.items()})
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if os.environ.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    missing = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"RANK={os.environ['RANK']} is set but {', '.join(missing)} is not",
            "the ranks can't find each other",
            "start with deepspeed, torchrun or srun, or set all of them",
        )
    return rank_of_environment()


def rank_of_environment() -> tuple[int, int]:
    """(rank, world size) as the variables say; one of one where RANK is not set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    if wrong := [f"{n}={os.environ[n]!r}" for n in names if not os.environ.get(n, "0").isdecimal()]:
        raise ConfigError(
            f"{', '.join(wrong)} is no number", remedy="start with deepspeed, torchrun or srun, or correct it"
        )
    if "RANK" not in os.environ:
        return 0, 1
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"RANK={os.environ['RANK']} is set but WORLD_SIZE is not",
            remedy="start with deepspeed, torchrun or srun, or set all of them",
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world_size:
        raise ConfigError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}",
            "the ranks would wait for each other",
            "number them from 0, or unset both",
        )
    return rank, world_size


def is_first() -> bool:
    """Whether this is rank 0, or the only process: the one that speaks for all. So does one of no valid number."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    ranks = os.environ.get("WORLD_SIZE", "")
    return not rank.isdecimal() or int(rank) == 0 or (ranks.isdecimal() and int(rank) >= int(ranks))


def is_launched() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ)


def ranks_here() -> int:
    """How many ranks the launcher started on this host; 0 where it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
