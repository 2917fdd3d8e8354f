"""`glide-ds prepare pack`: a folder or a list of pictures and captions to balanced tar shards.

glide-ds prepare pack photos/ --out shards/            pictures with texts of the same name, or a metadata.jsonl
glide-ds prepare pack photos/ --out shards/ --hold_out 0.02     2 % of them in shards/held-out, to validate on
glide-ds prepare pack pairs.jsonl --out shards/        {"image": path, "caption": text, …} a line; .csv, .tsv too
glide-ds prepare pack pairs.parquet --out shards/      columns image (path or bytes) and caption; folders of them
glide-ds prepare pack captions_train2017.json …        COCO's captions, beside the folder of its pictures
"""

from __future__ import annotations

import argparse
import json

from glide_ds.commands.train import at_least_one
from glide_ds.data.packing.pack import HELD_OUT, pack
from glide_ds.files import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=user_path, help="a folder, .jsonl, .csv, .tsv, .json or .parquet")
    parser.add_argument("--out", type=user_path, required=True)
    parser.add_argument("--per_shard", type=at_least_one, default=1000)
    parser.add_argument(
        "--hold_out",
        type=float,
        metavar="SHARE",
        help="share of the pictures that is packed into OUT/held-out, where training finds what to validate on; which "
        "ones follows from their bytes, so a folder that grows moves none; default: what OUT was packed with, else 0",
    )
    parser.add_argument("--workers", type=at_least_one, default=4)


def run(args: argparse.Namespace) -> None:
    summary = pack(args.input, args.out, args.per_shard, args.workers, hold_out=args.hold_out)
    print(json.dumps({key: value for key, value in summary.items() if key != "skipped"}, indent=1))
    for line in summary["skipped"][:20]:
        print(f"skipped {line}")
    held = summary.get("held_out")
    for line in [*summary["foreign"], *(held["foreign"] if held else [])][:20]:
        print(f"left as it is, for it was not packed here, yet would be used: {line}")
    if held and held["trained_before"]:
        print(f"!! {args.out} had no held-out shards before: a model trained on it has seen these pictures")
    if held and not held["samples"]:
        print(f"!! a share of {held['share']} holds none of these pictures out: give a larger one")
    elif held:
        print(
            f"held out: {held['samples']:,} pictures in {args.out / HELD_OUT}; validation.every=N measures on them"
        )
    print(f"Next: glide-ds preflight --ds_config ds_configs/base.json --set data.shards='{args.out}/*.tar'")
