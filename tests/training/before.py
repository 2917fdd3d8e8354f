"""Checkpoints as they were before there were safetensors: DeepSpeed's own files, pickles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_kit import opened

from glide_ds.config import Config
from glide_ds.files import sha256
from glide_ds.training.checkpoint.commit import MANIFEST, OWN_HASH


def sign(folder: Path, files: list[Path], drop: tuple[str, ...] = ()) -> None:
    """Let the manifest have these files, as they are now."""
    told = json.loads((folder / MANIFEST).read_text())
    for key in (OWN_HASH, *drop):
        told.pop(key, None)
    told["files"] = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(told))


def write_as_before(config: Config) -> Path:
    """Let DeepSpeed write the newest checkpoint of the run, which a lone rank saved, anew. Returns its folder."""
    with opened(config) as run:
        made, engine = run.start.resumed, run.engine
        assert made is not None
        assert dist.get_world_size() == 1
        if engine.frozen:  # bf16: they were written in fp32

            def frozen(attribute: Any) -> dict[str, Any]:
                return {name: attribute(tensor) for name, tensor in engine.frozen.items()}

            engine._get_zero_frozen_param_attributes = frozen
        engine.save_checkpoint(str(made.path), tag="theirs", client_state={}, save_latest=False)
        files = [path.rename(made.path / path.name) for path in (made.path / "theirs").glob("*.pt")]
        shutil.rmtree(made.path / "theirs")
        if run.ema:
            files.append(made.path / "ema_rank_0.pt")
            torch.save({"updates": run.ema.updates, "parts": run.ema.parts}, files[-1])
    for path in (*made.path.glob("*.safetensors"), *made.path.glob("*.py")):  # DeepSpeed adds its own export
        path.unlink()
    sign(made.path, files, drop=("engine", "averages", "stay"))
    return made.path
