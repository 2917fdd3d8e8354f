"""Who hangs where, as far as pure functions tell it; test_ranks_stop.py has the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_kit import make_config

from glide_ds.training.watchdog import Watch, hang_limit
from glide_ds.types import ConfigError


def test_the_hang_limit_is_half_of_the_timeout_unless_given(tmp_path: Path):
    where = str(tmp_path / "run")
    assert hang_limit(make_config(tmp_path, run={"dir": where, "timeout_s": 90.0}).run) == 45
    assert hang_limit(make_config(tmp_path, run={"dir": where, "timeout_s": 90.0, "hang_s": 30.0}).run) == 30
    with pytest.raises(ConfigError, match=r"run\.hang_s = 90\.0 is not less than run\.timeout_s = 90\.0"):
        make_config(tmp_path, run={"dir": where, "timeout_s": 90.0, "hang_s": 90.0})


def test_a_watch_counts_marks_and_the_batches_of_a_step():
    watch = Watch()
    for step in (3, 4):
        for _ in range(2):
            for mark in ("data", "forward", "backward", "step"):
                watch.at(mark, step)
    assert (watch.mark, watch.step, watch.micro, watch.count) == ("step", 4, 2, 16)
    assert list(watch.over([7, 8])) == [7, 8]
    assert (watch.count, watch.beats) == (16, 2)
