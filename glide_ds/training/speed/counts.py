"""What counting on the meta device found, kept on disk: it takes seconds, most of them torch's symbolic shapes.

A count follows from the model's shapes and settings, from our code and from torch, so it is kept under a hash of these.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import glide_ds
from glide_ds.config import cache_dir
from glide_ds.files import write_file
from glide_ds.model.glide import Glide

log = logging.getLogger(__name__)


def remembered(what: str, model: Glide, count: Callable[[], Any]) -> Any:
    """`count()`, which is JSON, or what it was for an equal model; a cache that can't be written is done without."""
    path = cache_dir() / "counts" / f"{what}-{_key(model)}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s can't be read (%s); counting again", path, error)
    found = count()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(found))
    except OSError as error:
        log.info("%s can't be written (%s); the next start will count again", path, error)
    return found


def _key(model: Glide) -> str:
    """A hash of all that a count depends on."""
    tensors = [
        (n, t.shape, t.dtype, t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())
    ]
    plain = (bool, int, float, str, tuple, type(None))
    settings = [
        (name, type(module).__name__, {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in model.named_modules()
    ]
    text = repr((torch.__version__, _code(), model.config, tensors, settings))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A hash of the model's code and of the counters'."""
    package = Path(glide_ds.__file__).parent
    files = [
        *sorted((package / "model").glob("*.py")),
        *(package / "training" / "speed" / f"{n}.py" for n in ("memory", "flops")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
