"""Stopping well, as far as one process shows it; test_ranks_stop.py has the signals and the ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_kit import make_config, metrics

from glide_ds.training.faults.signals import REPEAT_S, STOP_SIGNALS, StopSignals
from glide_ds.training.faults.stopping import REASONS, Deadline, Stop, mark_stopped
from glide_ds.training.faults.watchdog import Watch
from glide_ds.training.run import run_phases


def test_only_the_same_signal_again_after_a_while_means_at_once():
    signals = StopSignals()
    assert not signals.heard(signal.SIGINT, 10.0)
    assert not signals.heard(signal.SIGINT, 10.0 + REPEAT_S / 2)  # torchrun hands a Ctrl-C on
    assert not signals.heard(signal.SIGTERM, 10.0 + 2 * REPEAT_S)  # so does deepspeed, as SIGTERM
    assert not signals.heard(signal.SIGCHLD, 20.0)
    assert not signals.heard(signal.SIGCHLD, 30.0)
    assert signals.asked is signal.SIGINT
    assert signals.heard(signal.SIGINT, 10.0 + REPEAT_S)
    for number in (signal.SIGXCPU, signal.SIGHUP):  # every second; from the shell, then from the terminal
        assert not any(signals.heard(number, now) for now in (20.0, 30.0))


def test_every_signal_that_asks_for_a_stop_has_its_reason():
    assert {number.name for number in STOP_SIGNALS} < set(REASONS)


LOSES_ITS_READER = """
import os, sys, time
from glide_ds.training.faults.signals import SIGNALS
SIGNALS.install()
while SIGNALS.asked is None:
    print("a line")
    print("another", file=sys.stderr)
    time.sleep(0.01)
"""


def test_a_reader_that_is_gone_ends_nothing():
    # `train.py | tee log`: Ctrl-C ends tee too, maybe first.
    command = [sys.executable, "-c", LOSES_ITS_READER]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    assert process.stdout.readline() in ("a line\n", "another\n")
    process.stdout.close()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_the_time_limit_leaves_room_for_the_longest_step_twice():
    deadline = Deadline(1000.0, started=0.0)
    assert not deadline.reached(949.0)
    assert deadline.reached(950.0)  # a twentieth
    for now in (100.0, 110.0, 210.0, 220.0):  # a save of 90 s
        deadline.tick(now)
    assert not deadline.reached(799.0)
    assert deadline.reached(800.0)
    assert Deadline(100 * 3600.0, started=0.0).reached(100 * 3600.0 - 600)
    assert not Deadline(100 * 3600.0, started=0.0).reached(100 * 3600.0 - 601)
    assert not Deadline(0.0, started=0.0).reached(1e9)


def test_a_persons_own_stop_file_goes_before_every_other_reason():
    assert max(REASONS, key=REASONS.index) == "stop_file"


def test_no_marker_is_left_where_the_run_is_finished(tmp_path: Path):
    (tmp_path / "STOP").touch()
    mark_stopped(tmp_path, Stop("stop_file", "full", 4), finished=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # three phases set up
def test_a_stop_ends_the_whole_command_and_the_same_command_goes_on(tmp_path: Path, group: torch.device):
    phases = [
        make_config(tmp_path, phase, train={"steps": 2, "phase": phase})
        for phase in ("adapter_only", "adapter_gates")
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    run_phases(phases, group, Watch())
    marker = json.loads((run / "STOPPED.json").read_text())
    assert (marker["reason"], marker["phase"], marker["step"]) == ("stop_file", "adapter_only", 0)
    assert abs(time.time() - time.mktime(time.strptime(marker["time"][:19], "%Y-%m-%dT%H:%M:%S"))) < 86400
    assert not list(run.glob("phase*/step-*"))  # nothing was done, so nothing is saved
    run_phases(phases, group, Watch())
    assert [(line["phase"], line["step"]) for line in metrics(tmp_path)] == [
        (phase, step) for phase in ("adapter_only", "adapter_gates") for step in (1, 2)
    ]
    assert not (run / "STOPPED.json").exists()
    assert not (run / "STOP").exists()


@pytest.mark.slow  # a phase set up
def test_the_time_limit_stops_a_run(tmp_path: Path, group: torch.device):
    run_phases(
        [make_config(tmp_path, "base", run={"dir": f"{tmp_path}/run", "max_hours": 1e-9})], group, Watch()
    )
    assert json.loads((tmp_path / "run" / "STOPPED.json").read_text())["reason"] == "max_hours"
