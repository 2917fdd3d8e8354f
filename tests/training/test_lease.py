"""Two jobs for one run directory: one trains, the other says so; a killed one leaves nothing that needs a hand."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from ranks import Run, Warm

from glide_ds.errors import ConfigError
from glide_ds.training.faults import lease
from glide_ds.training.faults.lease import leased


def hold(folder: Path, held: Event) -> None:
    with lease.take(folder, 5):
        held.set()
        time.sleep(600)


@pytest.mark.usefixtures("group")
def test_a_directory_in_use_is_refused_until_its_holder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease, "HERE_S", 0.3)
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    other = fork.Process(target=hold, args=(tmp_path, held))
    other.start()
    try:
        assert held.wait(60)
        told = rf"in use by process {other.pid} on host .* since 20"
        with pytest.raises(ConfigError, match=told), leased(tmp_path, 0.3):
            pass
    finally:
        other.kill()
        other.join()
    with leased(tmp_path, 0.3):
        assert str(os.getpid()) in (tmp_path / lease.LOCK_FILE).read_text()
    with leased(tmp_path, 0.3):
        pass


@pytest.mark.slow
def test_of_two_that_start_at_once_one_trains_and_a_killed_one_is_followed_at_once(warm: Warm, tmp_path: Path):
    runs = [Run(warm, tmp_path / name, checkpoint={"every": 2}) for name in ("a", "b")]
    for run in runs:
        run.train(1, 10**6, f"run.dir={tmp_path / 'shared'}")
    give_up = time.monotonic() + 120
    while all(run.alive() for run in runs):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    refused, training = sorted(runs, key=Run.alive)
    assert refused.wait() == [2]
    assert "in use by process" in refused.said()
    training.until(training.trained)
    training.kill()
    assert training.wait() == [-9]
    refused.train(1, 10**6, f"run.dir={tmp_path / 'shared'}")
    refused.until(refused.trained)
    refused.kill()
    assert refused.wait() == [-9]
