"""log.wandb: one run over kills and resumes, each step in it once. Offline, by wandb itself."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from ranks import Run, Warm
from train_kit import make_config

from glide_ds.errors import ConfigError
from glide_ds.training import trackers

OFFLINE: dict[str, Any] = {"log": {"every": 1, "wandb": {"project": "glide", "mode": "offline"}}}
BLOCK = 32768  # of LevelDB's log format, in which wandb keeps a run


def records(path: Path) -> Iterator[bytes]:
    """The records of one file, whole ones alone."""
    data, at, parts = path.read_bytes(), 7, b""  # after wandb's own header
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


class Logged(NamedTuple):
    """What one file of wandb's holds."""

    run: str
    steps: list[int]  # of its lines, in their order
    drawn: list[int]  # those with a sample grid
    configured: list[str]  # the phases whose configuration is with it


def read(path: Path) -> Logged:
    from wandb.proto import wandb_internal_pb2

    found = Logged("", [], [], [])
    for content in records(path):
        record = wandb_internal_pb2.Record.FromString(content)
        if record.HasField("run"):
            found = found._replace(run=record.run.run_id)
            found.configured.extend(item.key for item in record.run.config.update)
        if record.HasField("history"):
            items = record.history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            assert values["_step"] == len(found.steps)
            found.steps.append(values["base/step"])
            assert values["base/loss"] > 0
            if "base/samples" in values:
                found.drawn.append(values["base/step"])
    return found


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_run_with_each_step_once(warm: Warm, tmp_path: Path):
    pytest.importorskip("wandb")
    log = OFFLINE["log"] | {"samples_every": 3, "sample_steps": 1, "samples": 1}
    run = Run(warm, tmp_path, "base", checkpoint={"every": 3}, log=log)
    for wanted in (8, 14):
        run.train(1, 1000)
        run.until(lambda wanted=wanted: run.updates() >= wanted)
        run.kill()
        run.wait()
    last = run.updates() + 3
    run.train(1, last)
    assert run.wait() == [0], run.said()
    (path,) = run.dir.glob("wandb/offline-run-*/run-*.wandb")
    found = read(path)
    assert found.run == json.loads((run.dir / "run.json").read_text())["run"]
    assert found.steps == list(range(1, last + 1))
    assert found.drawn == [step for step in found.steps if step % 3 == 0 or step == last]
    assert "base" in found.configured
    assert run.said().count("its lines are written again") >= 1


class Service:
    """wandb's run in the cloud, which has been sent so many lines before."""

    def __init__(self, there: int) -> None:
        self.step, self.got = there, []

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, values: dict[str, Any], step: int) -> None:
        self.got.append((step, values["full/step"]))

    def finish(self) -> None:
        pass


@pytest.mark.parametrize(("there", "sent"), [(0, [0, 1, 2, 3, 4]), (3, [3, 4]), (9, [])])
def test_a_run_in_the_cloud_is_sent_what_it_lacks(
    tmp_path: Path, monkeypatch: Any, there: int, sent: list[int]
):
    service = Service(there)
    wandb = SimpleNamespace(init=lambda **_: service, Image=None, Settings=dict, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # whose import takes seconds
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"run": "abc"}')
    lines = [json.dumps({"phase": "full", "step": 10 * number, "loss": None}) for number in range(3)]
    tracker = trackers.Wandb(make_config(tmp_path, log={"wandb": {"project": "glide"}}), lines)
    for number in (3, 4):
        tracker.line({"phase": "full", "step": 10 * number, "validation": {"loss": 1.0}})
    assert (4, 40) not in service.got  # its grid may come yet
    tracker.close()
    assert service.got == [(number, 10 * number) for number in sent]


def test_what_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_config(tmp_path, **OFFLINE)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"log\.wandb\.project = 'glide' and wandb is not installed"):
        trackers.check_installed(config)
    trackers.check_installed(make_config(tmp_path))


def test_the_run_there_has_the_run_directorys_id_and_name(tmp_path: Path):
    config = make_config(tmp_path, **OFFLINE)
    told = trackers.arguments(config, "abc")
    assert (told["id"], told["name"], told["resume"]) == ("abc", "run", None)
    online = make_config(tmp_path, log={"wandb": {"project": "glide", "name": "mine"}})
    told = trackers.arguments(online, "abc")
    assert (told["id"], told["name"], told["resume"]) == ("abc", "mine", "allow")
    assert told["config"]["full"]["glide_ds"]["train"]["steps"] == 4
