"""`glide-ds prepare shapes`: the built-in shapes as WebDataset shards."""

from __future__ import annotations

import argparse

from glide_ds.data.shapes import HELD_OUT, write_shards
from glide_ds.files import check_place, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glide-ds prepare shapes`."""
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="DIR", help="folder for the shards, made if missing"
    )
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many samples")
    parser.add_argument(
        "--per_shard", type=int, default=1000, metavar="N", help="samples per shard [%(default)s]"
    )
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of the pictures [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set [%(default)s]")
    parser.add_argument("--held_out", action="store_true", help="samples that no training draws")


def run(args: argparse.Namespace) -> None:
    """Write the shards and say where."""
    start = HELD_OUT if args.held_out else 0
    check_place(args.out)
    paths = write_shards(args.out, args.count, args.per_shard, args.size, args.seed, start)
    size = sum(path.stat().st_size for path in paths)
    print(f"{args.count} samples in {len(paths)} shards, {size / 1e6:.1f} MB: {paths[0]} ... {paths[-1].name}")
    print(
        f"Next: glide-ds preflight --ds_config ds_configs/tiny/phase1.json --set data.shards='{args.out}/*.tar'"
    )
