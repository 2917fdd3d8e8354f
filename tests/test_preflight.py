"""`glide-ds preflight`: every planted fault is found and named, by its own check alone; a good setup passes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_kit import make_config, rewound, without_launcher, write_shard

from glide_ds import cli
from glide_ds.data import shapes
from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import write_store
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.errors import ConfigError, Fault
from glide_ds.model import create_model
from glide_ds.model.clip import weights_hash
from glide_ds.preflight.checks import CHECKS, read_hostfile
from glide_ds.preflight.ranks import judge_clocks, judge_pairs
from glide_ds.preflight.runner import describe, look, merge
from glide_ds.preflight.site import Finding, Site, faults_of
from glide_ds.training.setup import glide_config

BY_NAME = {check.name: check for check in CHECKS}
TOGETHER = ("shared", "clocks", "network", "step")  # need a process group


def make_site(config: Any, **changes: Any) -> Site:
    values: dict[str, Any] = {"nodes": 1, "gpus": 1, "samples": 16}
    return Site([config], **{**values, **changes})


def failing(site: Site) -> dict[str, Finding]:
    """Every check that one process can do alone, by name, where it finds a fault."""
    found = {check.name: look(check, site) for check in CHECKS if check.name not in TOGETHER}
    return {name: finding for name, finding in found.items() if finding.faults}


def on_shards(folder: Path, phase: str = "adapter_only", **sections: Any) -> Any:
    """A configuration of a phase on four good shards."""
    shards = folder / "shards"
    if not shards.exists():
        shapes.write_shards(shards, 32, 8, 32)
    data = {"shards": str(shards / "shapes-{000000..000003}.tar"), "trim": False} | sections.pop("data", {})
    model = {"weights": "random"} | sections.pop("model", {})
    return make_config(folder, phase, data=data, model=model, **sections)


# ---- the faults, each planted in an otherwise good setup: the check that finds it, and words of its message


def batch_that_does_not_divide(folder: Path) -> Any:
    return make_site(on_shards(folder), nodes=3), "batch", "4 can't be split evenly over 3", "use 3 or 6"


def missing_shard(folder: Path) -> Any:
    config = on_shards(folder)
    (folder / "shards" / "shapes-000002.tar").unlink()
    return make_site(config), "shards", "1 of 4 shards do not exist", "correct the pattern"


def truncated_shard(folder: Path) -> Any:
    config, path = on_shards(folder), folder / "shards" / "shapes-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    return make_site(config), "shards", "000001.tar is damaged", "fetch it again"


def changed_shard(folder: Path) -> Any:
    config = on_shards(folder)
    open_shards(config.data.shards)  # makes the indexes
    replaced = shapes.write_shards(folder / "other", 9, 9, 32)[0]
    replaced.replace(folder / "shards" / "shapes-000003.tar")
    return make_site(config), "shards", "000003.tar changed since", "prepare index --force"


def broken_pictures(folder: Path) -> Any:
    samples = [{"jpg": b"\xff\xd8 no picture", "txt": b"a red circle"} for _ in range(8)]
    config = on_shards(folder, data={"shards": write_shard(folder / "broken.tar", samples)})
    return make_site(config), "samples", "8 of 8 samples are unusable", "mend the data"


def filter_that_drops_everything(folder: Path) -> Any:
    config = on_shards(folder, data={"filter": {"min_similarity": 0.3}})
    return make_site(config), "samples", "data.filter drops 16 of 16", "loosen data.filter"


def weights_of_another_model(folder: Path) -> Any:
    other = make_config(folder / "other", model={"architecture": {}})
    torch.save(create_model(glide_config(other)).state_dict(), folder / "other.pt")
    config = on_shards(folder, model={"weights": str(folder / "other.pt")})
    return make_site(config), "weights", "does not fit a base model: 10 missing", "give other weights"


def weights_that_are_not_finite(folder: Path) -> Any:
    state = create_model(glide_config(make_config(folder))).state_dict()
    state["time_embed.0.bias"][3] = torch.nan
    torch.save(state, folder / "nan.pt")
    config = on_shards(folder, model={"weights": str(folder / "nan.pt")})
    return make_site(config), "weights", "not finite (first in time_embed.0.bias)", "earlier checkpoint"


def real_data_without_weights(folder: Path) -> Any:
    return (
        make_site(on_shards(folder, model={"weights": "auto"})),
        "weights",
        "has no weights",
        "model.weights=",
    )


def unknown_clip_weights(folder: Path) -> Any:
    config = on_shards(folder, clip={"model": "ViT-B/32", "weights": "openia"})
    return make_site(config), "clip", "openia", "openai"


def clip_store_of_another_encoder(folder: Path) -> Any:
    config = on_shards(folder, data={"clip_store": str(folder / "clip")})
    opened = open_shards(config.data.shards)
    fill_store(folder / "clip", opened, Encoder("ViT-L/14", "openai", "text"))
    return make_site(config), "clip", "made with clip.model=ViT-L/14", "prepare clip"


def fill_store(store: Path, shards: ShardSet, encoder: Encoder, weights: str = "") -> None:
    """Embeddings of other samples' captions."""
    for url, head in zip(shards.urls, shards.heads, strict=True):
        note = StoreNote(encoder, weights, head.fingerprint, head.version, head.samples, 16, 0)
        rows, hashes = np.ones((head.samples, 16), np.float16), np.arange(1, head.samples + 1, dtype=np.uint64)
        write_store(store, url, rows, hashes, note)


def clip_store_of_other_captions(folder: Path) -> Any:
    config = on_shards(folder, data={"clip_store": str(folder / "clip")})
    opened, clip = open_shards(config.data.shards), config.clip
    encoder = Encoder(clip.model, clip.weights, clip.source)
    fill_store(folder / "clip", opened, encoder, weights_hash(clip.model, clip.weights))
    return make_site(config), "clip", "is not what was embedded", "prepare clip` again"


def clip_store_of_other_weights(folder: Path) -> Any:
    config = on_shards(folder, data={"clip_store": str(folder / "clip")})
    clip = config.clip
    fill_store(
        folder / "clip", open_shards(config.data.shards), Encoder(clip.model, clip.weights, clip.source), "f00"
    )
    return make_site(config), "clip", "were made by weights with the hash f00", "prepare clip` again"


def disk_too_small(folder: Path) -> Any:
    config = on_shards(folder, train={"steps": 10**9}, checkpoint={"every": 1, "keep": 0})
    return make_site(config), "disk", "checkpoints take up to", "lower checkpoint.keep"


def run_directory_that_can_not_be_written(folder: Path) -> Any:
    (folder / "file").write_text("in the way")
    config = on_shards(folder, run={"dir": str(folder / "file" / "run")})
    return make_site(config), "write", "can't hold checkpoints", "choose another run.dir"


def host_without_a_name(folder: Path) -> Any:
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=1\nnode17.nosuch.invalid slots=1\n")
    site = make_site(on_shards(folder), hostfile=hostfile)
    return site, "hosts", "'node17.nosuch.invalid'", "add it to DNS or /etc/hosts"


def memory_too_small(folder: Path) -> Any:
    batch = 4_000_000
    return make_site(on_shards(folder, train_batch_size=batch)), "memory", "per rank, but", "AdamW8bit"


def stop_file_left_behind(folder: Path) -> Any:
    config = on_shards(folder)
    Path(config.run.dir).mkdir(parents=True)
    (Path(config.run.dir) / "STOP").touch()
    return make_site(config), "resume", "STOP is there", "remove"


PLANTED = [
    batch_that_does_not_divide,
    missing_shard,
    truncated_shard,
    changed_shard,
    broken_pictures,
    filter_that_drops_everything,
    weights_of_another_model,
    weights_that_are_not_finite,
    real_data_without_weights,
    unknown_clip_weights,
    clip_store_of_another_encoder,
    clip_store_of_other_captions,
    clip_store_of_other_weights,
    disk_too_small,
    run_directory_that_can_not_be_written,
    host_without_a_name,
    memory_too_small,
    stop_file_left_behind,
]
assert len(PLANTED) >= 13  # two more in the run directory below, four between ranks and in the step


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_by_its_check_and_no_other(plant: Callable[[Path], Any], tmp_path: Path):
    site, check, fact, remedy = plant(tmp_path)
    found = failing(site)
    assert list(found) == [check], {name: finding.faults for name, finding in found.items()}
    (fault,) = found[check].faults
    assert fact in fault.fact
    assert remedy in fault.remedy


@pytest.mark.slow
def test_a_good_setup_has_no_fault(tmp_path: Path):
    assert failing(make_site(on_shards(tmp_path))) == {}
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_damaged_checkpoint_and_a_changed_configuration_are_found(trained: Path, tmp_path: Path):
    settings = {"train": {"steps": 5, "lr_scale": {"gates": 3.0}}}
    folder = rewound(trained, tmp_path, 4)
    good = look(BY_NAME["resume"], make_site(make_config(folder, **settings)))
    assert not good.faults
    assert "full goes on at step 4 of 5" in good.text
    model = folder / "run" / "phase3" / "step-00000004" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    changed = make_config(folder, **settings, optimizer={"type": "AdamW", "params": {"lr": 0.5}})
    faults = look(BY_NAME["resume"], make_site(changed)).faults
    assert "optimizer.params.lr: 0.001 → 0.5" in faults[0].fact
    assert "does not match its hash" in faults[1].fact
    assert "put the file back" in faults[1].remedy
    assert len(faults) == 2


@pytest.mark.slow
def test_a_step_that_breaks_the_weights_is_found(group: torch.device, tmp_path: Path):
    config = make_config(
        tmp_path, "full", optimizer={"type": "AdamW", "params": {"lr": 1e38, "weight_decay": 9e9}}
    )
    (fault,) = look(BY_NAME["step"], make_site(config, device=group)).faults
    assert "not finite" in fault.fact
    assert "lr" in fault.remedy
    assert list(tmp_path.iterdir()) == [tmp_path / "full.json"]


@pytest.mark.slow
def test_a_good_step_is_saved_and_loaded_and_leaves_nothing(group: torch.device, tmp_path: Path):
    config = make_config(tmp_path, "full", train_batch_size=8, train_micro_batch_size_per_gpu=2)
    finding = look(BY_NAME["step"], make_site(config, device=group))
    assert not finding.faults
    assert re.search(r"loss \d+\.\d+, set up in", finding.text)
    assert list(tmp_path.iterdir()) == [tmp_path / "full.json"]


# ---- judging what ranks measured


def test_a_clock_that_is_off_is_named():
    finding = judge_clocks([("node1", 100.0), ("node1", 100.01), ("node2", 160.5), ("node3", 99.0)])
    (fault,) = finding.faults
    assert "node2 is +60.5 s from that of node1" in fault.fact


def test_a_slow_pair_is_named():
    speeds = {("node1 rank 0", "node2 rank 8"): 10e9, ("node1 rank 0", "node3 rank 16"): 9e9}
    assert judge_pairs(speeds)[1] == ()
    text, (fault,) = judge_pairs({**speeds, ("node2 rank 8", "node3 rank 16"): 1e9})
    assert text == "3 pairs at 1.00 to 10.00 GB/s"
    assert "between node2 rank 8 and node3 rank 16 only 1.00 GB/s pass, the median pair has 9.00" in fault.fact


def test_ranks_findings_become_one():
    shared = Fault("no disk", remedy="free some")
    merged = merge(
        [Finding("mine"), Finding("", (shared,)), Finding("", (shared, Fault("no card", remedy="add one")))]
    )
    assert merged.text == "mine"
    assert [f.fact for f in merged.faults] == ["rank 1: no disk", "rank 2: no card"]


# ---- what a person sees


def test_the_remedy_stands_under_the_fact_and_colour_is_for_terminals():
    finding = Finding(
        "", (Fault("the disk is full", remedy="free space"), Fault("so is the tape", remedy="rewind"))
    )
    plain = describe("disk", finding, 1.25, terminal=False)
    assert [line.strip() for line in plain.splitlines()] == [
        "FAIL disk      1.2 s  the disk is full",
        "→ free space",
        "so is the tape",
        "→ rewind",
    ]
    assert "\033[31mFAIL" in describe("disk", finding, 1.25, terminal=True)
    assert describe("disk", Finding("enough"), 0.0, terminal=False) == "  ok   disk      0.0 s  enough"


def test_an_error_s_faults_are_its_own_and_any_other_s_its_message():
    error = ConfigError.all_of([Fault("x = 3 is odd; so", "nothing fits", "give 2"), Fault("y = 3")])
    assert faults_of(error) == error.faults
    (fault,) = faults_of(OSError("disk; full"))
    assert fault.fact == "disk; full"


@pytest.mark.parametrize(
    ("text", "words"), [("", "names no host"), ("node1\n", "'node1'"), ("node1 slots=x\n", "slots=N")]
)
def test_a_hostfile_that_can_not_be_read_is_named(tmp_path: Path, text: str, words: str):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_hostfile(path)


def test_a_hostfile_is_read_as_deepspeed_does(tmp_path: Path):
    path = tmp_path / "hostfile"
    path.write_text("# ours\nnode1 slots=8\n\nnode2 slots=4  # old\n")
    assert read_hostfile(path) == [("node1", 8), ("node2", 4)]


# ---- the whole command


def command(*arguments: str, cwd: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *(launcher or ("-m", "glide_ds.preflight")), *arguments]
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        line,
        cwd=cwd,
        env={**without_launcher(), "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_unreadable_configuration_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["preflight", "--ds_config", str(tmp_path / "none.json")]) == 2
    assert "can't be read" in capsys.readouterr().err


WORKER = """
import os, sys, time
rank = int(os.environ["RANK"])
if rank == 1:
    os.chdir(sys.argv.pop(1))  # a relative run.dir is then another folder
    real = time.time
    time.time = lambda: real() + 60
else:
    sys.argv.pop(1)
from glide_ds.cli import main
sys.exit(main(["preflight", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_two_ranks_name_all_faults_together_and_find_what_differs_between_them(tmp_path: Path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    on_shards(tmp_path, run={"dir": "run"}, train_batch_size=3)
    (tmp_path / "shards" / "shapes-000000.tar").unlink()
    (tmp_path / "elsewhere").mkdir()
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(worker))
    arguments = (str(tmp_path / "elsewhere"), "--ds_config", str(tmp_path / "adapter_only.json"), "--no_step")
    done = command(*arguments, "--set", "clip.model=ViT-Q", cwd=tmp_path, launcher=launcher)
    assert done.returncode == 1, done.stdout + done.stderr  # torchrun's own
    assert "(exitcode: 2)" in done.stderr
    assert done.stdout.index("glide_ds: preflight of") < done.stdout.index("phases")
    assert "5 of 15 checks failed: batch, clip, shards, shared, clocks," in done.stdout, (
        done.stdout + done.stderr
    )
    assert "rank 1: " in done.stdout
    assert "all-reduce right on 2 ranks" in done.stdout
    assert "1 pairs at" in done.stdout
    assert re.search(r"the clock of \S+ is \+60\.\d s", done.stdout)


@pytest.mark.slow
def test_a_good_setup_on_two_ranks_takes_a_step_together(tmp_path: Path, root: Path):
    started = time.monotonic()
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "-m",
        "glide_ds",
        "preflight",
    )
    config = str(root / "ds_configs" / "tiny" / "phase1.json")
    done = command("--ds_config", config, "--set", f"run.dir={tmp_path}/run", cwd=root, launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Next: deepspeed --num_gpus 2 launch/train.py --ds_config " in done.stdout.splitlines()[-1]
    assert re.search(r"ok   step .*loss", done.stdout)
    assert "all is well" in done.stdout
    assert list(tmp_path.iterdir()) == []
    print(f"{time.monotonic() - started:.0f} s")  # shown with -s: the promise is 60 s on an idle machine
