"""`python -m glide_ds`, for launchers that take a module: `deepspeed --module glide_ds preflight …`."""

import sys

from glide_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
