"""Distributed fine-tuning of OpenAI's GLIDE with CLIP conditioning on DeepSpeed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glide_ds.commands.drawing.drawer import Drawer

if sys.version_info < (3, 11):  # noqa: UP036 - before an import that an older one can't read ends in a traceback
    sys.exit(
        f"glide_ds needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}; make an environment "
        "of its own with bash launch/env.sh, then .venv/bin/python"
    )

__version__ = "0.1.0"


def load(source: str, upsampler: str | None = None, device: Any = None, **options: Any) -> Drawer:
    """A model that draws: `glide_ds.load("mine.pt")("a corgi", n=4)` (commands.drawing.drawer: load, Drawer)."""
    from glide_ds.commands.drawing.drawer import load  # torch, which importing glide_ds does not

    return load(source, upsampler, device, **options)
