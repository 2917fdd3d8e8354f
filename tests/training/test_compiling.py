"""train.compile: the losses are the eager run's, drawing and validating go without it, a machine that can't says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_kit import ARCHITECTURE, make_config, metrics, opened

from glide_ds.errors import ConfigError
from glide_ds.training.loop import train
from glide_ds.training.speed import compiling

STEPS = 50
# Two blocks of each kind: what takes the time here is the C++ compiler.
SMALL = {**ARCHITECTURE, "channel_mult": [1], "attention_ds": [1]}


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one(tmp_path: Path, group):
    losses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        options = {"steps": STEPS, "compile": compiled, "recompute": "attention"}
        config = make_config(folder, train=options, model={"architecture": SMALL}, checkpoint={"every": STEPS})
        with opened(config) as run:
            assert all((block.compiled is not None) == compiled for block in run.model.blocks().values())
            train(run)
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] != losses[0]  # other kernels round otherwise


def test_a_machine_that_cannot_compile_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], group
):
    import torch._dynamo

    def fail(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no g++ found\nand more")

    monkeypatch.setattr(compiling, "_one_step", fail)
    told = pytest.raises(ConfigError, match=r"train.compile=true.*no g\+\+ found.*train.compile=false")
    with told, opened(make_config(tmp_path, train={"compile": True})):
        pass
    assert "in fp32, blocks compiled" in " ".join(capsys.readouterr().out.split())
