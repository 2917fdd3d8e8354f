"""A run directory from a stranger: whatever reads it executes nothing of it, and says what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import make_config, train_phase

from glide_ds.commands.export import export
from glide_ds.commands.load import find_checkpoint, load_model
from glide_ds.errors import GlideError
from glide_ds.files import sha256
from glide_ds.training.checkpoint.commit import MANIFEST, OWN_HASH

pytestmark = pytest.mark.usefixtures("group")
STEPS = 5  # of the fixture's run


class Payload:
    """What leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def poison(folder: Path, pattern: str, trace: Path) -> Path:
    """Put code into a file of the newest checkpoint, beside all that belongs there, and sign it."""
    return rewrite(folder, pattern, lambda content: {**content, "extra": Payload(trace)})


def rewrite(folder: Path, pattern: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Change a file of the newest checkpoint, and sign it."""
    made = folder / "run" / "phase3" / f"step-{STEPS:08d}"
    (path,) = made.glob(pattern)
    torch.save(change(torch.load(path, weights_only=False)), path)
    told = json.loads((made / MANIFEST).read_text())
    told.pop(OWN_HASH)
    told["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (made / MANIFEST).write_text(json.dumps(told))
    return path


def exported(folder: Path) -> None:
    export(find_checkpoint(folder / "run"), folder / "x.pt")


def exported_average(folder: Path) -> None:
    export(find_checkpoint(folder / "run"), folder / "x.pt", ema=True)


def drawn_from(folder: Path) -> None:
    load_model(str(folder / "run"), torch.device("cpu"), ema=True)


def resumed(folder: Path) -> None:
    train = {"steps": STEPS + 1, "lr_scale": {"gates": 3.0}}
    train_phase(make_config(folder, train=train, ema={"decay": 0.5}))


def continued_by_a_phase(folder: Path) -> None:
    (folder / "run" / "phase3").rename(folder / "run" / "phase2")
    (folder / "run" / "run.json").unlink()
    train_phase(make_config(folder, train={"steps": 1}))


MODEL, OPTIMIZER, AVERAGE = "mp_rank_00_*", "*optim_states.pt", "ema_rank_0.pt"


@pytest.mark.parametrize(
    ("pattern", "reader"),
    [
        *((MODEL, reader) for reader in (exported, drawn_from, resumed, continued_by_a_phase)),
        *((OPTIMIZER, reader) for reader in (exported, resumed)),
        *((AVERAGE, reader) for reader in (exported_average, drawn_from, resumed)),
    ],
)
def test_code_in_a_checkpoint_is_refused_and_not_executed(
    trained: Path, tmp_path: Path, pattern: str, reader: Callable[[Path], None]
):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    trace = tmp_path / "executed"
    path = poison(tmp_path, pattern, trace)
    with pytest.raises(GlideError, match=r"GLOBAL.*mkdir") as caught:
        reader(tmp_path)
    assert path.name in str(caught.value)
    assert not trace.exists()
    torch.load(path if path.exists() else next((tmp_path / "run").rglob(path.name)), weights_only=False)
    assert trace.exists()  # the payload is one


def test_a_checkpoint_from_before_a_part_of_the_model_says_how_to_go_on(trained: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    without = {"clip_vector.out.weight", "clip_vector.out.bias", "clip_vector.clip_gate"}
    rewrite(
        folder,
        MODEL,
        lambda content: {**content, "module": {k: v for k, v in content["module"].items() if k not in without}},
    )
    with pytest.raises(GlideError, match=r"before the model had clip_vector.* and more.*glide-ds export"):
        resumed(folder)
    exported(folder)  # what it says to do
    assert (folder / "x.pt").exists()
