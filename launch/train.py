"""Train GLIDE with CLIP conditioning, under any launcher.

    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase3.json
    deepspeed --num_gpus 8 launch/train.py --ds_config ds_configs/phase1.json ds_configs/phase2.json \\
        ds_configs/phase3.json --config run.yaml --set data.shards='/data/{00000..00999}.tar'

The same command again continues where the run was left.
"""

import argparse
import os
import sys

from glide_ds.types import GlideError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--dry_run", action="store_true", help="say what would happen, and end")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    args = parser.parse_args()
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        print(f"glide_ds: reading {', '.join(args.ds_config)}", flush=True)
    try:
        from glide_ds.training.run import main as train  # torch and DeepSpeed take seconds to import

        train(args.ds_config, args.config, args.set, args.dry_run)
    except GlideError as error:
        # Every rank raises the same error; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
