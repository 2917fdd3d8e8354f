"""A run directory from a stranger: whatever reads it executes nothing of it, and says what it refuses."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from before import sign, write_as_before
from ranks import Run, Warm
from train_kit import copy_run, make_config, metrics, shake, train_phase

from glide_ds import cli
from glide_ds.commands.export import export
from glide_ds.commands.load import find_checkpoint, load_model
from glide_ds.errors import GlideError
from glide_ds.model.tensor_files import read_state, write_state
from glide_ds.training.checkpoint.commit import MANIFEST, committed
from glide_ds.training.logging import JsonLines
from glide_ds.training.zero import elastic
from glide_ds.training.zero.elastic import trained_weights
from glide_ds.training.zero.stored import MODEL_FILE, model_state, optimizer_file

pytestmark = pytest.mark.usefixtures("group")
STEPS = 5  # of the fixture's run
OPTIONS: dict[str, Any] = {
    "train": {"steps": STEPS + 1, "lr_scale": {"gates": 3.0}},
    "ema": {
        "decay": 0.5,
    },
}


class Payload:
    """What leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def newest(folder: Path) -> Path:
    return folder / "run" / "phase3" / f"step-{STEPS:08d}"


def signed(path: Path) -> None:
    """Let the manifest beside it have the file as it is now."""
    sign(path.parent, [file for file in path.parent.iterdir() if file.name != MANIFEST])


@pytest.fixture(scope="module")
def before(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with its newest checkpoint as it was written before there were safetensors."""
    folder = tmp_path_factory.mktemp("before")
    shutil.copytree(trained / "run", folder / "run", symlinks=True)
    write_as_before(make_config(folder, **OPTIONS))
    return folder


def exported(folder: Path) -> None:
    export(find_checkpoint(folder / "run"), folder / "x.pt")


def exported_average(folder: Path) -> None:
    export(find_checkpoint(folder / "run"), folder / "x.pt", ema=True)


def exported_length(folder: Path) -> None:
    export(find_checkpoint(folder / "run"), folder / "x.pt", ema=0.07)


def drawn_from(folder: Path) -> None:
    load_model(str(folder / "run"), torch.device("cpu"), ema=True)


def evaluated(folder: Path) -> None:
    told(["evaluate", str(folder / "run"), "--captions", "0", "--samples", "1"])


def sampled(folder: Path) -> None:
    words = ["--prompt", "a red circle", "--steps", "1", "--out", str(folder / "x.png")]
    told(["sample", str(folder / "run"), *words])


def told(words: list[str]) -> None:
    """Run a command line, its error not turned into an exit code."""
    args = cli.build_parser(words).parse_args(words)
    args.handler(args)


def resumed(folder: Path) -> None:
    train_phase(make_config(folder, **OPTIONS))


def resumed_with_all(folder: Path) -> None:
    train_phase(make_config(folder, **OPTIONS | {"ema": {"decay": 0.5, "snapshot_every": 100}}))


def continued_by_a_phase(folder: Path) -> None:
    (folder / "run" / "phase3").rename(folder / "run" / "phase2")
    (folder / "run" / "run.json").unlink()
    train_phase(make_config(folder, train={"steps": 1}))


READERS = {
    "model": (exported, drawn_from, resumed, continued_by_a_phase),
    "optim": (exported, resumed),
    "ema": (exported_average, drawn_from, resumed),
}
NEWER = {"power": (exported_length, resumed_with_all)}
STORED = [("trained", f"{kind}*.safetensors", "truncated or damaged", kind) for kind in READERS | NEWER]
STORED += [("before", f"*{kind}*.pt", r"GLOBAL.*mkdir", kind) for kind in READERS]


def poisoned(folder: Path, tmp_path: Path, pattern: str) -> tuple[Path, Path]:
    """A copy of a run with code in a file of its newest checkpoint; what the code makes where it is executed."""
    copy_run(folder / "run", tmp_path / "run")
    trace = tmp_path / "executed"
    (path,) = newest(tmp_path).glob(pattern)
    content = torch.load(path, weights_only=False) if path.suffix == ".pt" else {}
    path.unlink()
    torch.save({**content, "extra": Payload(trace)}, path)
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    trace.rmdir()  # the payload is one
    signed(path)
    return path, trace


@pytest.mark.parametrize(("stored", "pattern", "told", "kind"), STORED)
def test_code_in_a_checkpoint_is_not_executed(
    request: pytest.FixtureRequest, tmp_path: Path, stored: str, pattern: str, told: str, kind: str
):
    path, trace = poisoned(request.getfixturevalue(stored), tmp_path, pattern)
    for reader in (READERS | NEWER)[kind]:  # the last of them moves things
        with pytest.raises(GlideError, match=told) as caught:
            reader(tmp_path)
        assert path.name in str(caught.value)
        assert not trace.exists()


TEXTS = {  # what else there is to read, and who reads it
    "phase3/step-*/manifest.json": (exported, sampled, evaluated, resumed, continued_by_a_phase),
    "run.json": (resumed,),
    "metrics.jsonl": (resumed, continued_by_a_phase),
    "phase3/rollback.json": (resumed,),
    "tensorboard/full/events*": (),  # TensorBoard's alone
}
READ = (exported, sampled, evaluated, resumed, continued_by_a_phase)


@pytest.mark.parametrize(
    ("pattern", "readers"),
    [
        *((pattern, readers) for pattern, readers in TEXTS.items() if readers),
        *(pytest.param(pattern, READ, marks=pytest.mark.slow) for pattern in TEXTS),
    ],
)
def test_code_in_any_other_file_of_a_run_is_not_executed(
    trained: Path, tmp_path: Path, pattern: str, readers: tuple[Callable[[Path], None], ...]
):
    for reader in readers:
        folder = tmp_path / reader.__name__
        copy_run(trained / "run", folder / "run")
        files = list((folder / "run").glob(pattern)) or [folder / "run" / pattern]
        for file in files:
            file.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
        if reader in TEXTS[pattern]:
            with pytest.raises(GlideError) as caught:
                reader(folder)
            assert files[0].name in str(caught.value)
            assert str(folder) in str(caught.value)
        else:
            reader(folder)
        assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["phase3/step-*/manifest.json", "run.json", "phase3/step-*/optim*-0.*"])
def test_two_ranks_refuse_what_a_stranger_put_into_a_run(
    warm: Warm, trained: Path, tmp_path: Path, pattern: str
):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    for file in (tmp_path / "run").glob(pattern):
        file.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
        if file.suffix == ".safetensors":
            signed(file)
    run = Run(warm, tmp_path, **OPTIONS)
    run.train(2, STEPS + 1, "train.lr_scale.gates=3.0")
    assert run.wait() == [2, 2], run.said()
    assert pattern.rpartition("/")[2].partition("*")[0] in run.said()
    assert "Traceback" not in run.said()
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_before_is_read_as_the_same(trained: Path, before: Path, tmp_path: Path):
    for name, folder in (("now", trained), ("before", before)):
        copy_run(folder / "run", tmp_path / name / "run")
        exported(tmp_path / name)
        exported_average(tmp_path / name)
        (tmp_path / name / "x.pt").rename(tmp_path / name / "average.pt")
        exported(tmp_path / name)
        resumed(tmp_path / name)
    assert {path.suffix for path in newest(before).iterdir()} == {".pt", ".json"}
    now, then = tmp_path / "now", tmp_path / "before"
    assert metrics(now, steady=True) == metrics(then, steady=True)
    for name in ("x.pt", "average.pt"):
        one, other = read_state(now / name), read_state(then / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    ends = [committed(folder / "run" / "phase3")[0] for folder in (now, then)]
    assert ends[0].step == STEPS + 1
    assert ends[0].manifest["files"] == ends[1].manifest["files"]  # all tensors, by their hashes
    assert ends[0].manifest["engine"] == ends[1].manifest["engine"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"optimizer": "AdamW8bit"}, {"bf16": {"enabled": True}}])
def test_a_checkpoint_of_before_goes_on_as_the_same(tmp_path: Path, options: dict[str, Any]):
    if "optimizer" in options:
        options = {"optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-3}}}
    phase = "full" if "optimizer" in options else "adapter_only"  # which has frozen weights
    for name in ("now", "before"):
        for steps in (2, 4):
            config = make_config(tmp_path / name, phase, train={"steps": steps}, ema={"decay": 0.5}, **options)
            train_phase(config, shake)
            if (name, steps) == ("before", 2):
                write_as_before(config)
    ends = [committed(next((tmp_path / name / "run").glob("phase*")))[0] for name in ("now", "before")]
    assert ends[0].manifest["files"] == ends[1].manifest["files"]
    assert ends[0].manifest["engine"] == ends[1].manifest["engine"]


def test_a_checkpoint_from_before_a_part_of_the_model_says_how_to_go_on(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    made = committed(tmp_path / "run" / "phase3")[0]
    without = {"clip_vector.out.weight", "clip_vector.out.bias", "clip_vector.clip_gate"}
    groups = [[name for name in names if name not in without] for names in made.manifest["engine"]["groups"]]
    masters = dict(trained_weights(made, elastic.masters(made)))
    lines = {f"{i}.master": torch.cat([masters[name].flatten() for name in g]) for i, g in enumerate(groups)}
    kept = {name: tensor for name, tensor in model_state(made).items() if name not in without}
    write_state(made.path / optimizer_file(0), made.read(optimizer_file(0)) | lines)
    write_state(made.path / MODEL_FILE, kept)
    made.manifest["engine"]["groups"] = groups
    (made.path / MANIFEST).write_text(json.dumps(made.manifest))
    signed(made.path / MODEL_FILE)
    with pytest.raises(GlideError, match=r"before the model had clip_vector.* and more.*glide-ds export"):
        resumed(tmp_path)
    exported(tmp_path)  # what it says to do
    assert read_state(tmp_path / "x.pt").keys() == kept.keys()


@pytest.mark.parametrize(
    "texts",
    [
        ("{", '{"lr_cut": NaN}'),
        pytest.param(("[1]", "null", '{"x": 1}', '{"rollbacks": "9"}', "\xff"), marks=pytest.mark.slow),
    ],
)
def test_a_rollback_that_can_not_be_read_is_answered(trained: Path, tmp_path: Path, texts: tuple[str, ...]):
    copy_run(trained / "run", tmp_path / "run")
    for text in texts:
        (tmp_path / "run" / "phase3" / "rollback.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(GlideError, match=r"rollback.json can't be read .*restore it, or remove it"):
            resumed(tmp_path)


def test_a_line_of_metrics_that_can_not_be_read_is_answered(trained: Path, tmp_path: Path):
    copy_run(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    told = r"metrics.jsonl has a line that can't be read .*move the file away"
    for text in ("[1]", "1", "{}", '{"phase": "full", "step": "9"}', "\xff", "\0\0", "{"):
        path.write_bytes(whole + text.encode("latin-1") + b"\n")
        with pytest.raises(GlideError, match=told):
            JsonLines(path, "full", STEPS)
    with pytest.raises(GlideError, match=told):
        resumed(tmp_path)
    path.unlink()  # what it says to do
    resumed(tmp_path)


def test_a_run_json_that_can_not_be_read_is_answered(trained: Path, tmp_path: Path):
    copy_run(trained / "run", tmp_path / "run")
    for text in ("{", "[1]", "\xff"):
        (tmp_path / "run" / "run.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(GlideError, match=r"run.json can't be read"):
            resumed(tmp_path)
