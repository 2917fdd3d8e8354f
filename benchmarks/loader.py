"""The loader's costs per sample against their floors, in CPU time of one core, interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --out benchmarks/results/loader-cpu.json
    OMP_NUM_THREADS=1 python benchmarks/loader.py --against /path/to/another/clone

The floor is the raw read plus the JPEG's entropy decoding (libjpeg-turbo at 1/8, the least that decodes every
coefficient). The set is synthetic: dead leaves over 1/f clouds, shorter side 256-471 px, 20 % with white or black
borders, JPEG + txt + json. The stages take turns; a ratio is the median over rounds of the ratio within a round.
Beside it stands the ratio of every stage's fastest round: what else runs on the machine only adds, and more to
what needs more cache, so where the two differ the machine was not quiet.
Quality is that of a second set, against full decode, exact trim and Pillow's Lanczos; `variants` are what
glide_ds/data/pictures/decode.py could do instead, timed and judged on it too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import simplejpeg
import torch
import webdataset
from machine import commit, environment
from PIL import Image

from glide_ds import tokenizer
from glide_ds.config import DataConfig, FilterConfig
from glide_ds.data import build_source
from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import ClipStore, text_hash, write_store
from glide_ds.data.pictures.borders import content_box
from glide_ds.data.pictures.decode import REDUCED_SIDE, DecodeOptions, decode, open_pixels
from glide_ds.data.pictures.resample import Box, Pixels, resize
from glide_ds.data.samples import unread
from glide_ds.data.tars.index import scan_shard
from glide_ds.data.tars.shards import open_shards

CAPTION = "a dog runs along a beach with a stick in its mouth, the sea behind it"
SIDE, BATCH, CONTEXT = 64, 64, 128
PER_SHARD = 100
WORKER_ROUNDS = 20
CORRUPT = 100  # one in so many
Borders = tuple[int, int, int, int]  # top, bottom, left, right of what lies inside them
Picture = tuple[bytes, Borders]


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Occluding discs of power-law radii over 1/f clouds, with sensor noise: uint8 [height, width, 3]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)

    def clouds(slope: float) -> np.ndarray:
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        noise = np.fft.irfft2(phase / frequency**slope, s=(height, width))
        return (noise - noise.mean()) / noise.std()

    texture = clouds(1.3)
    pixels = rng.integers(40, 200, 3) + np.stack([clouds(1.4) * 25 for _ in range(3)], -1)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(60):
        radius = min(max(height, width) / 2, 6 * (1 - rng.random()) ** (-1 / 1.5))
        inside = (rows - rng.random() * height) ** 2 + (columns - rng.random() * width) ** 2 < radius**2
        shade = texture[inside, None] * rng.choice([3, 12, 25])
        pixels[inside] = rng.integers(0, 256, 3) + shade
    return (pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8)


def photo(seed: int, number: int) -> tuple[np.ndarray, Borders]:
    """A picture, every fifth in a white or black frame, and where in it the content lies."""
    rng = np.random.default_rng((seed, number))
    side = int(rng.integers(256, 472))
    if number % 5:
        longer = int(side * rng.uniform(1, 1.6))
        height, width = (side, longer) if number % 2 else (longer, side)
        return picture(rng, height, width), (0, height, 0, width)
    shorter = int(side / rng.uniform(1.15, 1.7))
    height, width = (shorter, side) if number % 2 else (side, shorter)
    framed = np.full((side, side, 3), 255 * (number % 10 > 0), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    framed[top : top + height, left : left + width] = picture(rng, height, width)
    return framed, (top, top + height, left, left + width)


def jpeg(seed: int, number: int) -> Picture:
    pixels, borders = photo(seed, number)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=80 + number % 13)
    return data.getvalue(), borders


def jpeg_256(seed: int, number: int) -> tuple[bytes, Borders]:
    """A picture without borders whose shorter side is 256 px, as img2dataset writes them by default."""
    image = Image.fromarray(photo(seed, number * 5 + 1)[0])
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue(), (0, image.height, 0, image.width)


def make_pictures(make: Callable[[int, int], Picture], seed: int, count: int) -> list[Picture]:
    with ProcessPoolExecutor() as pool:
        return list(pool.map(partial(make, seed), range(count), chunksize=10))


def write_set(folder: Path, images: list[bytes]) -> None:
    folder.mkdir()
    for first in range(0, len(images), PER_SHARD):
        with tarfile.open(folder / f"{first // PER_SHARD:04d}.tar", "w") as tar:
            for number, image in enumerate(images[first : first + PER_SHARD], first):
                text = f"a photo of many discs over clouds, number {number}"
                record = json.dumps({"caption": text, "width": 300, "height": 300})
                members = (("jpg", image), ("txt", text.encode()), ("json", record.encode()))
                for extension, content in members:
                    info = tarfile.TarInfo(f"{number:08d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def source(pattern: str, workers: int = 0) -> Any:
    return build_source(
        DataConfig(shards=pattern, workers=workers),
        image_size=SIDE,
        context_length=CONTEXT,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        seed=0,
    )


def webdataset_recipe(urls: list[str]) -> Iterator[Any]:
    """webdataset's documented pipeline to the same output: decode, resize and crop, tokenise, batch."""
    from torchvision import transforms

    resize = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.ToTensor()])

    def prepare(sample: tuple[Image.Image, str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, mask = tokenizer.encode([sample[1]], CONTEXT)
        return resize(sample[0]), tokens[0], mask[0]

    dataset = webdataset.WebDataset(urls, shardshuffle=False).shuffle(100).decode("pil")
    return iter(dataset.to_tuple("jpg", "txt").map(prepare).batched(BATCH))


def run_through(call: Callable[..., Any], *arguments: Iterable[Any]) -> None:
    """Call it for every item and keep nothing: memory that grows would cost what training never pays."""
    deque(map(call, *arguments), maxlen=0)


def drain(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def ideal(data: bytes, borders: Borders) -> np.ndarray:
    """By full decode, exact trim and Pillow's Lanczos: float [SIDE, SIDE, 3]."""
    top, bottom, left, right = borders
    cut = min(bottom - top, right - left)
    y, x = top + (bottom - top - cut) // 2, left + (right - left - cut) // 2
    square = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB")[y : y + cut, x : x + cut])
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)).astype(float)


def decibels(pixels: Pixels, wanted: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((pixels - wanted) ** 2).mean(), 1e-9)))


def rounded(pixels: Pixels, box: Box, rows: int, columns: int) -> Pixels:
    top, bottom, left, right = map(round, box)
    return resize(pixels, (top, bottom, left, right), rows, columns)


# What else could be done: attributes of glide_ds.data.pictures.decode.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "crop rounded to pixels": {"resize": rounded},
    "no more than the wanted side decoded": {"REDUCED_SIDE": 1.0},
    "1.5 times the wanted side decoded": {"REDUCED_SIDE": 1.5},
    "decoded again where trimming leaves less than the wanted side": {"ENOUGH": 1.0},
}


def judge_variants(
    samples: list[Picture], samples_256: list[Picture], rounds: int
) -> dict[str, dict[str, float]]:
    """Quality of each variant, and its time as a multiple of the first's, the variants taking turns."""
    options = DecodeOptions(SIDE)

    def run(variant: dict[str, Any], samples: list[Picture]) -> list[Pixels]:
        with ExitStack() as stack:
            for name, value in variant.items():
                stack.enter_context(mock.patch(f"glide_ds.data.pictures.decode.{name}", value))
            return [decode(data, options) for data, _ in samples]

    def judge(variant: dict[str, Any], samples: list[Picture]) -> np.ndarray:
        pairs = zip(run(variant, samples), samples, strict=True)
        return np.array([decibels(pixels, ideal(*sample)) for pixels, sample in pairs])

    times = measure({k: (len(samples), partial(run, v, samples)) for k, v in VARIANTS.items()}, rounds)
    judged = {}
    for name, variant in VARIANTS.items():
        found, found_256 = judge(variant, samples), judge(variant, samples_256)
        judged[name] = {
            "median dB": float(np.median(found)),
            "5th percentile dB": float(np.percentile(found, 5)),
            "bordered, median dB": float(np.median(found[::5])),
            "bordered, 5th percentile dB": float(np.percentile(found[::5], 5)),
            "of 256 px, median dB": float(np.median(found_256)),
            "of 256 px, 5th percentile dB": float(np.percentile(found_256, 5)),
            "times as long": float(np.median(times[name] / times["as it is"])),
            "times as long, fastest": float(times[name].min() / times["as it is"].min()),
        }
    return judged


def measure(stages: dict[str, tuple[int, Callable[[], Any]]], rounds: int) -> dict[str, np.ndarray]:
    """CPU microseconds per sample of each stage in each round, the stages taking turns."""
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(rounds):
        for name, (count, stage) in stages.items():
            start = time.process_time()
            stage()
            times[name].append((time.process_time() - start) / count * 1e6)
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path, help="another clone: nothing but this one's times beside its")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serve:
        serve(args.serve, args.samples, args.seed)
        return
    if args.against:
        found = compare(args.against, args.samples, args.rounds, args.seed)
        for name, times in found.items():
            print(f"{name:42s} " + ", ".join(f"{what} {value:.3f}" for what, value in times.items()))
        if args.out:
            commits = {"now": commit(Path(__file__).parent), "before": commit(args.against)}
            report = {"environment": environment("cpu"), "commits": commits, **found}
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = benchmark(Path(folder), make_pictures(jpeg, 2 * args.seed, args.samples), args.rounds)
    fresh = make_pictures(jpeg, 2 * args.seed + 1, args.samples)
    variants = judge_variants(fresh, make_pictures(jpeg_256, 2 * args.seed + 1, args.samples // 4), args.rounds)
    median, fastest = figures.values()
    print(f"{'rounds:':42s} {'median':>10s} {'fastest':>10s}")
    for name, value in median.items():
        print(f"{name:42s} {value:10.2f} {fastest[name]:10.2f}")
    for name, judged in variants.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in judged.items()))
    if args.out:
        report = {"environment": environment("cpu"), **figures, "variants": variants}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def compare(tree: Path, samples: int, rounds: int, seed: int) -> dict[str, Any]:
    """This clone's stages beside those of another: a round here, a round there, and the ratio within each pair."""
    trees = {"now": Path(__file__).parents[1], "before": tree}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers: dict[str, Any] = {}
        for name, path in trees.items():
            command = [sys.executable, __file__, "--serve", f"{folder}/{name}"]
            command += ["--samples", str(samples), "--seed", str(seed)]
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            servers[name] = stack.enter_context(process)
        turns = [{name: ask(server) for name, server in servers.items()} for _ in range(rounds + 1)][1:]
        for server in servers.values():
            server.stdin.close()
    found = {}
    for stage in turns[0]["now"]:
        times = {name: np.array([turn[name][stage] for turn in turns]) for name in trees}
        found[stage] = {name: float(np.median(of_tree)) for name, of_tree in times.items()}
        found[stage]["now / before"] = float(np.median(times["now"] / times["before"]))
        found[stage]["now / before, fastest rounds"] = float(times["now"].min() / times["before"].min())
    return found


def ask(server: Any) -> dict[str, float]:
    server.stdin.write("round\n")
    server.stdin.flush()
    return dict(json.loads(server.stdout.readline()))


def serve(folder: Path, samples: int, seed: int) -> None:
    """A round of all stages for every line that comes in: its CPU microseconds per sample, as JSON."""
    folder.mkdir()
    stages, _ = make_stages(folder, make_pictures(jpeg, 2 * seed, samples))
    for _ in sys.stdin:
        print(json.dumps({name: float(values[0]) for name, values in measure(stages, 1).items()}), flush=True)


Stages = dict[str, tuple[int, Callable[[], Any]]]  # by name: samples, and what goes through them


def make_stages(folder: Path, pictures: list[Picture]) -> tuple[Stages, int]:
    """The stages, and how many batches the set has."""
    clean, spoilt = folder / "clean", folder / "spoilt"
    datas, samples = [data for data, _ in pictures], len(pictures)
    write_set(clean, datas)
    write_set(spoilt, [d[: len(d) // 2] if n % CORRUPT == 7 else d for n, d in enumerate(datas)])
    shards = open_shards(str(clean))
    options = DecodeOptions(SIDE)
    skipped = unread(shards, FilterConfig())
    wanted = round(SIDE * REDUCED_SIDE)
    opened = [open_pixels(data, options, wanted) for data in datas]
    clip = fill_store(folder / "clip", shards)
    steps = samples // BATCH
    loaders = {name: source(str(path)) for name, path in (("clean", clean), ("spoilt", spoilt))}
    urls = shards.urls

    def entropy() -> None:
        for data in datas:
            simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1)

    def raw() -> None:
        for url in urls:
            with open(url, "rb") as file:
                while file.read(1 << 20):
                    pass

    batches = [np.arange(n, n + BATCH) for n in range(0, samples - BATCH + 1, BATCH)]
    return {
        "raw read": (samples, raw),
        "entropy decode": (samples, entropy),
        "decode + trim + resize": (samples, lambda: run_through(partial(decode, options=options), datas)),
        "index scan": (samples, lambda: run_through(scan_shard, urls)),
        "read + index": (samples, lambda: run_through(shards.read, range(samples), repeat(skipped))),
        "decode": (samples, lambda: run_through(partial(open_pixels, options=options, wanted=wanted), datas)),
        "trim": (samples, lambda: run_through(content_box, *zip(*opened, strict=True))),
        "trim, bordered": (len(opened[::5]), lambda: run_through(content_box, *zip(*opened[::5], strict=True))),
        "CLIP join": (len(batches) * BATCH, lambda: run_through(partial(join, clip), batches)),
        "whole loader": (steps * BATCH, lambda: drain(loaders["clean"].batches(0), steps)),
        "whole loader, 1 % corrupt": (steps * BATCH, lambda: drain(loaders["spoilt"].batches(0), steps)),
        "webdataset's recipe": (steps * BATCH, lambda: drain(webdataset_recipe(urls), steps)),
    }, steps


def benchmark(folder: Path, pictures: list[Picture], rounds: int) -> dict[str, dict[str, float]]:
    stages, steps = make_stages(folder, pictures)
    times = measure(stages, rounds)
    least = {name: float(values.min()) for name, values in times.items()}
    speeds = np.array([worker_round(str(folder / "clean"), steps) for _ in range(WORKER_ROUNDS)])
    one, two = speeds.max(axis=0).tolist()
    return {
        "median of the rounds": {
            **{name: float(np.median(values)) for name, values in {**times, **ratios(times)}.items()},
            "2 workers / 1 worker": float(np.median(speeds[:, 1] / speeds[:, 0])),
            "samples per second, 2 workers": float(np.median(speeds[:, 1])),
        },
        "fastest of the rounds": {
            **least,
            **ratios(least),
            "2 workers / 1 worker": two / one,
            "samples per second, 2 workers": two,
        },
    }


def ratios(times: Mapping[str, Any]) -> dict[str, Any]:
    floor, whole = times["raw read"] + times["entropy decode"], times["whole loader"]
    return {
        "floor": floor,
        "decode + trim + resize / floor": times["decode + trim + resize"] / floor,
        "whole loader / floor": whole / floor,
        "webdataset's recipe / whole loader": times["webdataset's recipe"] / whole,
        "slowdown by 1 % corrupt, %": (times["whole loader, 1 % corrupt"] / whole - 1) * 100,
    }


def worker_round(pattern: str, steps: int) -> list[float]:
    """Samples per second of one worker and of two: 1, 2, 2, 1, for the machine's speed drifts meanwhile."""
    one, two, two_again, one_again = (1 / throughput(pattern, workers, steps) for workers in (1, 2, 2, 1))
    return [2 / (one + one_again), 2 / (two + two_again)]


def throughput(pattern: str, workers: int, steps: int) -> float:
    """Samples per second of wall clock, after the workers have started. Needs as many free cores."""
    batches = source(pattern, workers).batches(0)
    drain(batches, 4 * workers)
    start = time.perf_counter()
    drain(batches, 4 * steps)
    return 4 * steps * BATCH / (time.perf_counter() - start)


def join(clip: ClipStore, batch: np.ndarray) -> None:
    clip.rows(batch, [text_hash(CAPTION) for _ in batch])


def fill_store(folder: Path, shards: Any) -> ClipStore:
    encoder = Encoder("benchmark", "none", "text")
    for url, head in zip(shards.urls, shards.heads, strict=True):
        note = StoreNote(encoder, "", head.fingerprint, head.version, head.samples, 768, 0)
        hashes = np.full(head.samples, text_hash(CAPTION), np.uint64)
        write_store(folder, url, np.ones((head.samples, 768), np.float16), hashes, note)
    return ClipStore(folder, shards, encoder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
