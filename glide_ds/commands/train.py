"""`glide-ds train`, which launch/train.py is too."""

from __future__ import annotations

import argparse

from glide_ds.environment import is_first
from glide_ds.training.faults.signals import SIGNALS


def at_least_one(text: str) -> int:
    """A number of an option that counts something. Raises ArgumentTypeError."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("give 1 or more")
    return count


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What names a run's configuration, on every command that reads one."""
    parser.add_argument(
        "--ds_config",
        nargs="+",
        required=True,
        metavar="JSON",
        help="one file per phase; several: one pipeline",
    )
    parser.add_argument("--config", metavar="YAML", help="values that the phases share, laid over the JSON")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        action="extend",
        help="single values, laid over both",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--dry_run", action="store_true", help="say what would happen, and end")


def run(args: argparse.Namespace) -> None:
    if not args.dry_run:
        SIGNALS.install()
    if is_first():
        print(f"glide_ds: reading {', '.join(args.ds_config)}", flush=True)
    from glide_ds.training.run import main  # torch and DeepSpeed take seconds to import

    main(args.ds_config, args.config, args.set, args.dry_run)
