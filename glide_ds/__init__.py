"""Distributed fine-tuning of OpenAI's GLIDE with CLIP conditioning on DeepSpeed."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before an import that an older one can't read ends in a traceback
    sys.exit(
        f"glide_ds needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}; make an environment "
        "of its own with bash launch/env.sh, then .venv/bin/python"
    )

__version__ = "0.1.0"
