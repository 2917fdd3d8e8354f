"""Train GLIDE with CLIP conditioning, under any launcher.

    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase3.json
    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase1.json ds_configs/phase2.json \\
        ds_configs/phase3.json --config run.yaml --set data.shards='/data/{00000..00999}.tar'

The same command again continues where the run was left.
"""

import argparse
import os
import sys

from glide_ds.commands.train import add_arguments, run
from glide_ds.training.faults.signals import SIGNALS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    if not args.dry_run:
        SIGNALS.install()
    speaks = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if speaks:
        print(f"glide_ds: reading {', '.join(args.ds_config)}", flush=True)
    from glide_ds.errors import EXIT_LOST, GlideError  # with torch, so the first line above is out by now

    try:
        run(args)
    except GlideError as error:
        # Every rank raises the same error, and one says it; a rank that is left alone says so itself.
        if speaks or error.exit_code == EXIT_LOST:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
