"""`python -m glide_ds.preflight`, for launchers: `glide-ds preflight` under another name."""

import argparse
import sys

from glide_ds.preflight import add_arguments, run


def main() -> int:
    parser = argparse.ArgumentParser("python -m glide_ds.preflight")
    add_arguments(parser)
    args = parser.parse_args()
    from glide_ds.errors import GlideError  # with it comes torch

    try:
        return run(args)
    except GlideError as error:
        print(f"glide-ds: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
