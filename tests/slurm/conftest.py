"""One Slurm cluster for all tests; where it can't be had they skip, except in CI, where they fail."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_kit

NODES = 12  # four jobs on two each, and those that a restarted one keeps off


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm_kit.Cluster]:
    reason = slurm_kit.missing()
    if reason and os.environ.get("GLIDE_DS_REQUIRE_SLURM"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="glide-slurm-", dir="/tmp"))  # short: see cluster.sh
    cluster = slurm_kit.Cluster(folder, NODES)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
