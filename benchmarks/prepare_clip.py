"""How fast `glide-ds prepare clip` is, in samples a second of wall clock, beside another clone's.

    python benchmarks/prepare_clip.py --against /path/to/another/clone --out benchmarks/results/prepare-clip-cpu.json

Pictures: JPEG of 256-471 px by the built-in encoder, which takes as little beside decoding as a large one on a GPU.
Captions: of 5 to 30 words, by the built-in encoder and by a text tower of ViT-B/32's shape with random weights. The
clones take turns, each in a process of its own, timed from the second set it embeds on: what compares them is the
median over turns of the ratio in the same turn.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from loader import jpeg, make_pictures, write_set
from machine import commit, environment

SHAPE = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
PER_SHARD = 100
WORDS = "a small red corgi in front of an old house with many people on its roof while it rains".split()  # noqa: SIM905
TINY = ["--model", "builtin:tiny", "--weights", "builtin"]


def write_sets(folder: Path, pictures: int, captions: int, large: int) -> None:
    write_set(folder / "warm", [data for data, _ in make_pictures(jpeg, 1, 8)])
    write_set(folder / "pictures", [data for data, _ in make_pictures(jpeg, 0, pictures)])
    dice = random.Random(0)
    for name, count in (("captions", captions), ("few captions", large)):
        (folder / name).mkdir()
        lines = [" ".join(dice.choices(WORDS, k=dice.randint(5, 30))) for _ in range(count)]
        for first in range(0, count, PER_SHARD):
            write_captions(folder / name / f"{first:06d}.tar", lines[first : first + PER_SHARD])


def write_captions(path: Path, lines: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, line in enumerate(lines):
            info = tarfile.TarInfo(f"{number:06d}.txt")
            info.size = len(line)
            tar.addfile(info, io.BytesIO(line.encode()))


def write_tower(folder: Path) -> list[str]:
    """The options that name a text tower of ViT-B/32's shape."""
    import torch
    from open_clip.transformer import TextTransformer

    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    about = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": SHAPE}
    (folder / "tower.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    torch.save(TextTransformer(**SHAPE, output_dim=512).state_dict(), folder / "tower.pt")
    return ["--model", str(folder / "tower.json"), "--weights", str(folder / "tower.pt")]


def one(words: list[str]) -> None:
    """Embed a set whole, having embedded another; prints the seconds. The sources are those that are imported."""
    from glide_ds.commands import prepare_clip

    parser = argparse.ArgumentParser()
    prepare_clip.add_arguments(parser)
    shards, warm, out, *rest = words
    prepare_clip.run(parser.parse_args([warm, "--out", f"{out}/warm", *rest]))
    began = time.perf_counter()
    prepare_clip.run(parser.parse_args([shards, "--out", f"{out}/store", *rest]))
    print("seconds", time.perf_counter() - began)


def seconds(tree: Path, words: list[str]) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--one", *words[:2], out, *words[2:]]
        told = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True
        )
    return float(told.stdout.split()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another clone, to compare with")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=8000, help="for the built-in encoder")
    parser.add_argument("--large", type=int, default=300, help="captions for the large one")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    trees = {"now": Path(__file__).parents[1]} | ({"before": args.against} if args.against else {})
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sets(folder, args.pictures, args.captions, args.large)
        kinds = {
            "pictures": (args.pictures, ["pictures", *TINY, "--source", "image"]),
            "captions": (args.captions, ["captions", *TINY]),
            "captions, ViT-B/32's tower": (args.large, ["few captions", *write_tower(folder)]),
        }
        for kind, (count, (shards, *rest)) in kinds.items():
            words = [str(folder / shards), str(folder / "warm"), *rest]
            turns = [{tree: seconds(path, words) for tree, path in trees.items()} for _ in range(args.turns)]
            found[kind] = {
                f"samples/s {tree}": count / statistics.median(t[tree] for t in turns) for tree in trees
            }
            if args.against:
                found[kind]["slowest turn, times as fast"] = min(t["before"] / t["now"] for t in turns)
                found[kind]["times as fast"] = statistics.median(t["before"] / t["now"] for t in turns)
            print(kind, found[kind], flush=True)
    if args.out:
        commits = {tree: commit(path) for tree, path in trees.items()}
        report = {"environment": environment("cpu"), "commits": commits, "turns": args.turns, **found}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
