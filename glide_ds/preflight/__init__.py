"""`glide-ds preflight`: find the mistake before the GPU hours.

Alone it checks files, hosts and arithmetic and takes one real step; launched over ranks, by any launcher that
starts training (`deepspeed --module glide_ds preflight …`), it checks the network between them too.
"""

from __future__ import annotations

import argparse

from glide_ds.commands.train import add_config_arguments
from glide_ds.environment import is_first
from glide_ds.files import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, help="that the run will have; default: the hostfile's, else 1")
    parser.add_argument("--gpus", type=int, help="per node; default: the hostfile's slots, else this machine's")
    parser.add_argument(
        "--hostfile", type=user_path, metavar="FILE", help="DeepSpeed's: whether its hosts resolve"
    )
    parser.add_argument("--samples", type=int, default=64, help="pictures to decode")
    parser.add_argument("--no_step", action="store_true", help="leave out the real training step")


def run(args: argparse.Namespace) -> int:
    """Run every check; 0 where all pass, 2 where one fails. Raises GlideError for an unreadable config."""
    if is_first():
        print(f"glide_ds: preflight of {', '.join(args.ds_config)}", flush=True)
    from glide_ds.preflight.runner import main  # torch and DeepSpeed take seconds to import

    return main(args)
