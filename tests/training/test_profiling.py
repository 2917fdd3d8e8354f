"""train.profile_steps: a trace of these updates that opens as JSON, the longest kernels in the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_kit import make_config, metrics, shake, train_phase

from glide_ds.errors import ConfigError
from glide_ds.training.speed.profiling import check_ranks

pytestmark = pytest.mark.usefixtures("group")


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "traced"), [("2:3", "2-3"), ("4:9", "4-4")])
def test_the_updates_named_are_traced_and_train_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: str, traced: str
):
    train_phase(make_config(tmp_path / "a", "base", train={"profile_steps": steps}), shake)
    (path,) = (tmp_path / "a" / "run" / "profile").iterdir()
    assert path.name == f"base-rank0-steps{traced}.pt.trace.json"
    events = json.loads(path.read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)
    out = capsys.readouterr().out
    assert f"traced steps {traced.replace('-', ' to ')}: {path}" in out
    assert "Self CPU" in out
    train_phase(make_config(tmp_path / "b", "base"), shake)
    assert metrics(tmp_path / "a", steady=True) == metrics(tmp_path / "b", steady=True)


def test_what_names_no_updates_or_no_ranks_is_refused(tmp_path: Path):
    for steps, told in (
        ("3", "names no updates"),
        ("0:2", "no updates"),
        ("3:2", "no updates"),
        ("9:9", "trace nothing"),
    ):
        with pytest.raises(ConfigError, match=told):
            make_config(tmp_path, train={"profile_steps": steps})
    config = make_config(tmp_path, train={"profile_steps": "1:2", "profile_ranks": [0, 2]})
    check_ranks(config, 3)
    with pytest.raises(ConfigError, match=r"profile_ranks = \[0, 2\] with 2 ranks"):
        check_ranks(config, 2)
