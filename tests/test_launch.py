"""The commands that people type. Slow: whole launches, each a minute or two on two idle cores."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import COMMAND, Run, Warm
from train_kit import UNSTEADY, read_lines, without_launcher

BIN = Path(sys.executable).parent
TINY = [f"ds_configs/tiny/phase{n}.json" for n in (1, 2, 3)]
# A random start of a still smaller model: what is tested is the launch, not the picture.
SMALL = [
    "model.weights=random",
    "model.architecture.image_size=16",
    "model.architecture.xf_layers=1",
    "model.architecture.channel_mult=[1, 2]",
    "model.architecture.attention_ds=[2]",
    "model.architecture.text_ctx=12",
    "model.architecture.xf_width=32",
    "model.architecture.xf_heads=2",
    "model.architecture.model_channels=32",
    "model.architecture.num_head_channels=16",
    "model.architecture.num_res_blocks=1",
    "train_batch_size=8",
    "data.workers=1",
]


def environment() -> dict[str, str]:
    kept = without_launcher()
    return {**kept, "PATH": f"{BIN}:{kept['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launch(root: Path, ranks: int, *arguments: str, port: int = 29611) -> list[str]:
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port)]
    return [*launcher, str(root / "launch" / "train.py"), *arguments]


def finish(root: Path, command: list[str], timeout: float = 600) -> str:
    with subprocess.Popen(
        command, cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            kill(process)  # a launcher that is stopped leaves its ranks running
    assert process.returncode == 0, f"{' '.join(command)}\n{out[-3000:]}\n{err[-6000:]}"
    return out


def steady(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in UNSTEADY} for line in read_lines(path)]


@pytest.mark.slow  # test_cli.py has the same in this process
def test_a_mistake_ends_the_command_with_one_message_and_code_2(root: Path):
    arguments = ["--ds_config", "ds_configs/tiny/phase3.json", "--set", "trian.steps=2"]
    command = [sys.executable, str(root / "launch" / "train.py"), *arguments]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("glide-ds: error: --set trian.steps=2: unknown key 'trian'")
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("glide_ds: reading ds_configs/tiny/phase3.json")


@pytest.mark.slow
@pytest.mark.alone
def test_the_literal_command_on_eight_ranks(root: Path, tmp_path: Path):
    # Without built-in weights the same command starts at random; the file is part of the package later.
    sets = ["train.steps=2", f"run.dir={tmp_path}/run"]
    if not (root / "glide_ds" / "tiny" / "glide.safetensors").is_file():
        sets.append("model.weights=random")
    out = finish(root, launch(root, 8, "--ds_config", "ds_configs/tiny/phase3.json", "--set", *sets))
    assert "batch   32 = micro-batch 4" in out
    assert "8 ranks" in out
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    manifest = json.loads((tmp_path / "run" / "phase3" / "LAST" / "manifest.json").read_text())
    assert manifest["world_size"] == 8


@pytest.mark.slow
def test_the_full_size_block_without_a_process_group(root: Path, tmp_path: Path):
    command = [sys.executable, str(root / "launch" / "train.py"), "--ds_config", "ds_configs/phase3.json"]
    out = finish(root, [*command, "--dry_run", "--set", f"run.dir={tmp_path}/run"])
    text = " ".join(out.split())
    assert "404,207,070 parameters" in text
    counts = {
        name: int(value.replace(",", "")) for name, value in re.findall(r"(\w+) ([\d,]{2,})(?=,| param)", text)
    }
    assert {"adapter", "gates", "unet", "text"} <= counts.keys()
    assert sum(counts[role] for role in ("adapter", "gates", "unet", "text")) == 404_207_070
    assert "frozen nothing" in text
    assert "ViT-L/14 text embeddings, 768-d" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_start_imports_no_compiler(root: Path, tmp_path: Path):
    """Nor torchvision and timm: more than half of what a rank would import, on every GPU."""
    sets = [*SMALL, f"run.dir={tmp_path}/run", "train.steps=1", "clip.source=both"]
    started = [sys.executable, "-X", "importtime", "launch/train.py", "--ds_config", TINY[2], "--set", *sets]
    done = subprocess.run(started, cwd=root, env=environment(), capture_output=True, text=True, check=True)
    assert "committed" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time")]
    found = {line.split("|")[-1].strip() for line in lines}
    assert "deepspeed" in found
    assert not found & {"torch._dynamo", "open_clip", "torchvision", "timm"}


@pytest.mark.slow
def test_a_pipeline_killed_at_any_instant_and_started_again_is_the_uninterrupted_one(
    warm: Warm, root: Path, tmp_path: Path
):
    # But for the last start the ranks are forked: a launcher takes 20 s, and has no part in what is lost.
    sets = [
        *SMALL,
        "train.steps=12",
        "checkpoint.every=2",
        "log.every=3",
        "log.samples_every=0",
        "data.trace=true",
    ]
    straight, killed = (Run(warm, tmp_path / name) for name in ("straight", "killed"))

    def begin(run: Run) -> None:
        run.start(2, COMMAND, ["train", "--ds_config", *TINY, "--set", *sets, f"run.dir={run.dir}"])

    begin(straight)
    assert straight.wait() == [0, 0], straight.said()
    moments = random.Random(0)
    for updates in (4, 9, 17, 24, 31):  # of all phases
        begin(killed)
        killed.until(lambda updates=updates: killed.updates() >= updates)
        time.sleep(moments.uniform(0, 0.4))
        killed.kill()
        killed.wait()
    whole = steady(straight.dir / "metrics.jsonl")
    assert [(line["phase"], line["step"]) for line in whole] == [
        (phase, step) for phase in ("adapter_only", "adapter_gates", "full") for step in (1, 3, 6, 9, 12)
    ]
    finish(root, launch(root, 2, "--ds_config", *TINY, "--set", *sets, f"run.dir={killed.dir}", port=29614))
    assert steady(killed.dir / "metrics.jsonl") == whole
    for rank in range(2):
        trace = f"trace/rank{rank}.jsonl"
        assert read_lines(killed.dir / trace) == read_lines(straight.dir / trace)


def descendants(pid: int) -> list[int]:
    """The process and all below it: the launcher puts its ranks into sessions of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # ended meanwhile
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to the process and all below it; to nothing where it has ended."""
    if process.poll() is not None:
        return
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _at_its_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that are run by nohup hand down that it is ignored


class Terminal:
    """A command on a terminal of its own, which is read back."""

    def __init__(self, command: list[str], root: Path) -> None:
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.text = ""
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env=environment(),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_at_its_terminal,
        )
        os.close(slave)

    def read(self) -> str:
        if self.master >= 0:
            with contextlib.suppress(BlockingIOError, OSError):  # nothing new; nobody writes there any more
                while new := os.read(self.master, 65536):
                    self.text += new.decode(errors="replace").replace("\r\n", "\n")
        self.process.poll()  # so that it does not stay a zombie
        return self.text

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, self.read()[-5000:]
            self.read()
            time.sleep(0.05)

    def hang_up(self) -> None:
        os.close(self.master)
        self.master = -1


def started_by(launcher: str, root: Path, port: int, *arguments: str) -> list[str]:
    if launcher == "deepspeed":
        return launch(root, 2, *arguments, port=port)
    train = [str(root / "launch" / "train.py"), *arguments]
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port), *train]
    return [sys.executable, *train]


STOPS = [
    ("plain", "Ctrl-C"),
    ("plain", "hang-up"),
    ("deepspeed", "Ctrl-C"),
    ("deepspeed", "kill"),
    ("deepspeed", "hang-up"),
    ("torchrun", "Ctrl-C"),
    ("torchrun", "kill"),
    ("torchrun", "hang-up"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "how"), STOPS)
def test_a_run_stopped_at_its_terminal_is_saved_and_has_the_last_word(
    root: Path, tmp_path: Path, launcher: str, how: str
):
    run = tmp_path / "run"
    sets = [*SMALL, f"run.dir={run}", "train.steps=100000", "log.samples_every=0", "data.trace=true"]
    port = 29620 + STOPS.index((launcher, how))
    terminal = Terminal(started_by(launcher, root, port, "--ds_config", TINY[0], "--set", *sets), root)
    try:
        terminal.until(lambda: len(traced(run)) >= 3, 300)
        if how == "Ctrl-C":  # to all that run there: command, launcher, ranks and workers
            os.write(terminal.master, b"\x03")
        elif how == "kill":
            terminal.process.terminate()
        else:
            terminal.hang_up()
        terminal.until(lambda: not working_in(run), 120)
    finally:
        for pid in working_in(run):  # a launcher that is gone has left them to nobody
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        terminal.process.wait(30)
    marker = json.loads((run / "STOPPED.json").read_text())
    # Of two signals at once either may be heard first; the terminal hangs up as a killed launcher that led it ends.
    heard = {"Ctrl-C": ("SIGINT", "SIGTERM"), "kill": ("SIGTERM", "SIGHUP"), "hang-up": ("SIGHUP", "SIGTERM")}
    assert marker["reason"] in heard[how]
    assert marker["step"] == len(traced(run)) < 100000
    assert (run / "phase1" / "LAST").readlink().name == f"step-{marker['step']:08d}"
    if how != "hang-up":
        told = f"stopped at step {marker['step']:,} of phase adapter_only ({marker['reason']}), saved in {run}"
        terminal.until(lambda: told in terminal.read().rstrip().rpartition("\n")[2], 20)
        plain = re.sub(r"\033\[\d*m", "", terminal.text)
        block = plain.partition("── glide_ds: phase")[2].partition("\n──────")[0]
        wide = [line for line in block.splitlines()[1:] if len(line) > 80 and str(tmp_path) not in line]
        assert block
        assert not wide


def traced(run: Path) -> list[str]:
    """Rank 0's updates."""
    path = run / "trace" / "rank0.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def working_in(run: Path) -> list[int]:
    """The processes that were told that run directory: command, launcher, ranks and workers, in any session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile; of a zombie nothing is left to read
            if f"run.dir={run}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.alone
def test_one_step_of_the_full_size_base_model_fits_in_24_gb(root: Path, tmp_path: Path):
    sets = [
        f"run.dir={tmp_path}/run",
        "train.steps=1",
        "train_batch_size=2",
        "model.weights=random",
        "log.samples_every=0",
        "data.workers=0",
        "validation.every=0",
    ]
    before = time.monotonic()
    finish(root, launch(root, 1, "--ds_config", "ds_configs/base.json", "--set", *sets), timeout=1500)
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    print(f"peak memory {line['memory_gib']:.1f} GiB, {time.monotonic() - before:.0f} s")
    assert line["memory_gib"] < 24
