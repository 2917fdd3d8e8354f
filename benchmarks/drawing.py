"""Drawing many pictures with the built-in tiny GLIDE: killed and resumed, memory, the best of eight by CLIP.

    OMP_NUM_THREADS=1 python benchmarks/drawing.py --out benchmarks/results/drawing-cpu.json

One process draws --pictures, its memory read after a tenth and after all; two processes draw the same, are killed
half-way and started again, and their files are compared byte for byte. Then eight pictures are drawn of each of
--captions held-out captions, and the judge reads the first of eight and the one that the built-in CLIP finds best.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import environment
from PIL import Image

from glide_ds.data import shapes
from glide_ds.files import sha256
from glide_ds.inference.judged import held_out_cases, judged

MODEL = "builtin:tiny"


def start(
    prompts: Path, folder: Path, *options: str, rank: int = 0, world_size: int = 1
) -> subprocess.Popen[bytes]:
    words = ["sample", MODEL, "--prompts", str(prompts), "--out_dir", str(folder), *options]
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, "-m", "glide_ds", *words], env=os.environ | ranks, stdout=subprocess.DEVNULL
    )


def drawn(folder: Path) -> int:
    return (
        sum(name.endswith(".png") and name[0] != "." for name in os.listdir(folder)) if folder.exists() else 0
    )


def wait_for(count: int, folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    while drawn(folder) < count and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def resident_mb(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1)  # type: ignore[index]


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def measure_resuming(place: Path, count: int) -> dict[str, Any]:
    prompts = place / "prompts.txt"
    prompts.write_text("\n".join(shapes.draw(i, 16)[1] for i in range(count)))
    options = ("--steps", "2", "--guidance", "1", "--sampler", "euler-a")
    began, one = time.perf_counter(), start(prompts, place / "one", *options)
    wait_for(count // 10, place / "one", [one])
    early = resident_mb(one)
    wait_for(count - 32, place / "one", [one])
    late = resident_mb(one)
    assert one.wait() == 0
    seconds = time.perf_counter() - began
    for until in (count // 2, count):
        two = [start(prompts, place / "two", *options, rank=rank, world_size=2) for rank in range(2)]
        wait_for(until, place / "two", two)
        if until < count:
            for process in two:
                process.kill()
            killed_at = drawn(place / "two")
        codes = [process.wait() for process in two]
    assert codes == [0, 0]
    return {
        "pictures": count,
        "seconds_of_one_process": round(seconds, 1),
        "resident_mb_after_a_tenth": early,
        "resident_mb_at_the_end": late,
        "memory_ratio": round(late / early, 4),
        "killed_at": killed_at,
        "files": len(files(place / "two")),
        "equal_file_for_file": files(place / "one") == files(place / "two"),
    }


def measure_ranking(place: Path, captions: int) -> dict[str, Any]:
    cases = held_out_cases(32, None, captions)
    prompts = place / "held_out.txt"
    prompts.write_text("\n".join(cases.captions))
    options = ("--n", "8", "--rerank", "8", "--rerank_by", MODEL)
    assert start(prompts, place / "ranked", *options).wait() == 0
    rows = [json.loads(line) for line in (place / "ranked" / "index.jsonl").read_text().splitlines()]
    chosen = {
        "first_of_8": [row["file"] for row in rows if row["seed"] == (row["line"] - 1) * 8],
        "best_of_8": [row["file"] for row in rows if row["place"] == 0],
    }
    report: dict[str, Any] = {"captions": captions}
    for name, names in chosen.items():
        pixels = [np.asarray(Image.open(place / "ranked" / file)) for file in names]
        score = judged(torch.from_numpy(np.stack(pixels)), cases.captions)
        report[name] = asdict(score)
        print(name, score, flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        if args.pictures:
            report["resuming"] = measure_resuming(Path(folder), args.pictures)
            print(report["resuming"], flush=True)
        if args.captions:
            report["ranking"] = measure_ranking(Path(folder), args.captions)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
