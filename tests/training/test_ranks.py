"""Two ranks over gloo against one: the same numbers, the same errors, one start for all tests here."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Ranks, Run, Warm
from test_bf16 import check_close_to_start
from train_kit import IN_BF16, PARITY, make_config, metrics, rewound, shake, trace, train_phase

from glide_ds import cli
from glide_ds.training.checkpoint.commit import committed
from glide_ds.training.zero.elastic import weights
from glide_ds.training.zero.stored import model_state

pytestmark = pytest.mark.slow  # three processes


class Launch(NamedTuple):
    folder: Path
    results: list[dict[str, Any]]  # by rank


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, group: torch.device, warm_process: Warm) -> Launch:
    """Both ranks' results; the one-rank run of the same configuration is trained in the meantime."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = Ranks(warm_process, folder)
    ranks.start(2, "rank_worker:main", str(folder))
    try:
        train_phase(make_config(folder / "one", **PARITY), shake)
        rewound(folder / "one", folder / "grown", 10)
        (folder / "grown.ready").touch()
        accumulated = {**PARITY, "train_micro_batch_size_per_gpu": 2}
        train_phase(make_config(folder / "halves", **accumulated), shake)
        assert ranks.wait(240) == [0, 0], ranks.said()
    finally:
        ranks.kill()
    train_phase(make_config(rewound(folder / "two", folder / "shrunk", 10), **PARITY), shake)
    return Launch(folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)])


def by_slot(folder: Path, ranks: int) -> list[list[tuple[int, int]]]:
    """(sample, timestep) of every slot of every global batch; rank r has the slots that are r modulo the ranks."""
    steps = []
    for lines in zip(*(trace(folder, rank) for rank in range(ranks)), strict=True):
        own = [zip(line["sample_ids"], line["timesteps"], strict=True) for line in lines]
        steps.append([pair for turn in zip(*own, strict=True) for pair in turn])
    return steps


def test_metrics_tell_the_share_of_time_that_ranks_talk(two_ranks: Launch):
    assert all(0 < line["communication_share"] < 1 for line in metrics(two_ranks.folder / "two"))
    assert all(line["communication_share"] == 0 for line in metrics(two_ranks.folder / "one"))


@pytest.mark.parametrize("other", ["two", "halves", "grown", "shrunk"])
def test_ranks_accumulation_and_resuming_on_other_ranks_change_no_loss(two_ranks: Launch, other: str):
    one, two = (metrics(two_ranks.folder / name) for name in ("one", other))
    assert len(one) == len(two) == 20
    for whole, parted in zip(one, two, strict=True):
        for key in ("loss", "vb", "grad_norm"):
            assert parted[key] == pytest.approx(whole[key], rel=1e-4), (whole["step"], key)
        for key in ("loss_by_quartile", "grad_norm_by_role", "gates"):
            assert parted[key] == pytest.approx(whole[key], rel=1e-3), (whole["step"], key)
        assert ("kl" in whole) == ("kl" in parted) == (whole["step"] % 4 == 1)
        assert parted.get("kl", 0) == pytest.approx(whole.get("kl", 0), rel=1e-3)
        assert {k: parted[k] for k in ("step", "lr", "samples_seen")} == {
            k: whole[k] for k in ("step", "lr", "samples_seen")
        }
    assert one[-1]["loss"] != one[0]["loss"]


def test_every_slot_has_the_same_sample_and_timestep(two_ranks: Launch):
    one = by_slot(two_ranks.folder / "one", 1)
    assert [len(pairs) for pairs in one] == [4] * 20
    assert by_slot(two_ranks.folder / "two", 2) == one
    assert by_slot(two_ranks.folder / "halves", 1) == one


def test_no_sample_is_read_by_two_ranks(two_ranks: Launch):
    ids = [
        {i for line in trace(two_ranks.folder / "two", rank)[:16] for i in line["sample_ids"]}
        for rank in (0, 1)
    ]
    assert not ids[0] & ids[1]
    assert len(ids[0]) == len(ids[1]) == 32  # one epoch of 64


def test_all_ranks_recompute_what_the_one_with_the_least_memory_must(two_ranks: Launch):
    assert [r["recompute"] for r in two_ranks.results] == [["blocks", "blocks"]] * 2


def test_an_error_on_one_rank_is_raised_by_all(two_ranks: Launch):
    assert [r["agreed"] for r in two_ranks.results] == ["DataError: only rank 1 sees this"] * 2


def test_the_logged_loss_is_the_mean_over_ranks(two_ranks: Launch):
    assert [r["meter"] for r in two_ranks.results] == [4.0, 4.0]


def test_all_ranks_fall_back_together(two_ranks: Launch):
    for result in two_ranks.results:
        newest, before, found, damaged = result["verified"]
        assert (newest, before, found, damaged) == (20, [], 10, 1)


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_previous_stands(two_ranks: Launch):
    for result in two_ranks.results:
        files, told, found = result["full_disk"]
        assert files == ["part0.safetensors", "part1.safetensors"]
        assert "rank 1: OSError: [Errno 28] No space left on device" in told
        assert "the previous checkpoint stands" in told
        assert found == 1


def test_the_checkpoint_holds_both_ranks_files(two_ranks: Launch):
    newest = committed(two_ranks.folder / "two" / "run" / "phase3")[0]
    assert newest.world_size == 2
    assert sum(name.startswith("optimizer") for name in newest.manifest["files"]) == 2
    one = model_state(committed(two_ranks.folder / "one" / "run" / "phase3")[0])
    state = model_state(newest)
    assert one.keys() == state.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=2e-3)


def test_two_ranks_checkpoint_is_exported_by_one(two_ranks: Launch, tmp_path: Path):
    from glide_ds.commands.export import export
    from glide_ds.commands.load import find_checkpoint

    written = export(find_checkpoint(two_ranks.folder / "two" / "run"), tmp_path / "x.safetensors")
    assert set(written) == {tmp_path / "x.safetensors"}


def test_gradients_that_keep_their_place_train_the_same_on_two_ranks(two_ranks: Launch):
    two, recorded = (metrics(two_ranks.folder / name, steady=True) for name in ("two", "recorded"))
    assert recorded == two
    states = [
        model_state(committed(two_ranks.folder / name / "run" / "phase3")[0]) for name in ("two", "recorded")
    ]
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


def test_in_bf16_no_weight_is_rounded_on_two_ranks_nor_on_the_way_to_one(two_ranks: Launch):
    folder = two_ranks.folder / "bf16"
    config = make_config(folder, "adapter_only", **{**IN_BF16, "train": {"steps": 2}})
    for updates in (1, 2):
        checkpoint = committed(folder / "run" / "phase1")[0]
        assert (checkpoint.step, checkpoint.world_size) == (updates, 3 - updates)
        check_close_to_start(weights(checkpoint), config, updates)
        train_phase(config)


def with_its_port_taken(words: list[str]) -> int:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        other.listen()
        return cli.main(words)


def test_a_port_that_is_taken_is_named_and_no_reason_to_try_again(warm_process: Warm, tmp_path: Path):
    run = Run(warm_process, tmp_path)
    run.start(1, "test_ranks:with_its_port_taken", run.words(1))
    assert run.wait() == [2]
    said = run.said()
    assert re.search(r"error: port \d+ of 127.0.0.1 is in use by another program.* --master_port \d+", said), (
        said
    )
    assert "Traceback" not in said
    assert "start again" not in said
