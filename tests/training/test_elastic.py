"""The arithmetic of repartitioning; test_ranks.py resumes a two-rank run on one rank."""

import pytest
import torch
import torch.distributed as dist

from glide_ds.training.elastic import own_part


@pytest.mark.parametrize("total", [1, 7, 12, 13])
@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_every_value_lands_on_its_new_rank_once(monkeypatch, total, before, after):
    line = torch.arange(1.0, total + 1)
    old = -(-total // before)
    parts = [line[i * old : (i + 1) * old] for i in range(before)]
    parts[-1] = torch.cat([parts[-1], torch.full((before * old - total,), -1.0)])  # padding is no value
    size = -(-total // after) + 1
    new = []
    for rank in range(after):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        new.append(own_part(parts, total, size))
    joined = torch.cat(new)
    assert torch.equal(joined[:total], line)
    assert not joined[total:].any()
