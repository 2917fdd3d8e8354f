"""Who hangs where, as far as pure functions tell it; test_ranks_stop.py has the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_kit import make_config

from glide_ds.errors import ConfigError
from glide_ds.training.faults.failures import brief, explanation, is_lost_peer
from glide_ds.training.faults.watchdog import Post, Watch, describe_hang, hang_limit, late_posts


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
        watch.at("log", step + 1)
    assert (watch.mark, watch.step, watch.micro, watch.count) == ("log", 5, 2, 18)
    assert list(watch.over([7, 8])) == [7, 8]
    watch.calls("reduce")
    watch.calls("all_gather")
    assert (watch.count, watch.beats) == (18, 2)
    assert (watch.collective, watch.collectives) == ("all_gather", 2)


def post(rank: int, mark: str, passed: int, step: int = 5) -> Post:
    return Post(rank, "node1", 100 + rank, 9, mark, step, 2, passed, 31.0)


def test_the_late_rank_has_passed_the_fewest_marks(tmp_path: Path):
    posts = [post(0, "backward", 12), post(1, "data", 10), post(2, "backward", 12), post(3, "step", 13)]
    assert [late.rank for late in late_posts(posts)] == [1]
    assert late_posts([post(0, "step", 7), post(1, "step", 7)]) == []  # a cut network: nobody is behind
    assert [late.rank for late in late_posts(posts[:1])] == [0]
    told = describe_hang(posts, set(), {1: "worker.py:3 sleep", 2: "loop.py:9 train"}, 30.0, tmp_path)
    assert told.splitlines()[:3] == [
        "no rank has moved for 30 s (run.hang_s); late: rank 1",
        "  rank 1 (node1, pid 101) in 'data' after step 5, batch 2 of global batch 5 for 31 s",
        "    worker.py:3 sleep",
    ]
    assert "  2 waiting in 'backward' after step 5: rank 0, 2" in told
    assert f"{tmp_path}/rank*.txt" in told


def test_the_last_collective_of_each_rank_is_told(tmp_path: Path):
    ahead, late = post(0, "backward", 12), post(1, "data", 10)
    posts = [
        ahead._replace(collective="reduce", collectives=31),
        late._replace(collective="all_gather", collectives=30),
    ]
    told = describe_hang(posts, set(), {}, 30.0, tmp_path)
    assert "batch 2 of global batch 5, last collective all_gather (number 30) for 31 s" in told
    assert "1 waiting in 'backward' after step 5, last collective reduce (number 31): rank 0" in told


def test_a_silent_rank_is_the_late_one(tmp_path: Path):
    posts = [post(0, "forward", 11), post(1, "forward", 11)]
    told = describe_hang(posts, {0}, {}, 30.0, tmp_path)
    assert "late: rank 0\n" in told
    assert "does not answer" in told


def test_many_late_ranks_stay_one_screen(tmp_path: Path):
    posts = [post(rank, "data" if rank < 100 else "backward", 10 if rank < 100 else 12) for rank in range(512)]
    told = describe_hang(posts, set(), {}, 30.0, tmp_path)
    assert len(told.splitlines()) < 15
    assert "412 waiting in 'backward'" in told


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
            True,
        ),
        ("Timed out waiting 30000ms for recv operation to complete", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:2395, remote process exited", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_peer_is_told_from_a_bug(text: str, lost: bool):
    assert is_lost_peer(RuntimeError(text)) is lost
    assert not is_lost_peer(ValueError(text))


def test_a_librarys_message_is_cut_to_its_fact():
    long = (
        "[/a/gloo/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:13205. This is typically …\nframe #0"
    )
    assert brief(RuntimeError(long)) == "Connection closed by peer [127.0.0.1]:13205"


def test_errors_of_the_machine_name_a_remedy(tmp_path: Path):
    config = make_config(tmp_path, train_batch_size=8)
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    told = str(explanation(full, config, config.batch_arithmetic(2)))
    assert "train_micro_batch_size_per_gpu=2 instead of 4" in told
    assert "train.recompute=blocks" in told
    assert "more\n" not in told
    one = make_config(tmp_path, train_batch_size=2, train={"recompute": "blocks"})
    told = str(explanation(full, one, one.batch_arithmetic(2)))
    assert "more ranks" in told
    assert "recompute" not in told
    killed = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")
    assert "data.workers=0" in str(explanation(killed, config, config.batch_arithmetic(1)))
    assert explanation(RuntimeError("a bug"), config, config.batch_arithmetic(1)) is None
