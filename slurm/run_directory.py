"""Print the run directory that launch/train.py's arguments name; code 2 and a message where they are wrong."""

import argparse
import sys

from glide_ds.commands.train import add_arguments


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="slurm", usage="… --ds_config JSON… [--config YAML] [--set KEY=VALUE…]"
    )
    add_arguments(parser)
    args = parser.parse_args()
    from glide_ds.config import load_config
    from glide_ds.errors import GlideError

    try:
        configs = [config for path in args.ds_config for config in load_config(path, args.config, args.set)]
    except GlideError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(configs[0].run.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
