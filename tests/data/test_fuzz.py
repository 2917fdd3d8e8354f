"""Damaged inputs of every kind: no crash, no hang, no lost slot, every one counted."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from data_kit import encoded, json_bytes, photo, sample, source, take, write_tar

GOOD = 200


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(chance.randint(1, 40)):
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    return bytes(broken)


def damaged(number: int, chance: random.Random) -> tuple[str, dict[str, bytes]]:
    """One sample with one kind of damage. Some survive it, which is fine: they must then be delivered."""
    kind = chance.choice(["JPEG", "PNG", "WEBP", "GIF"])
    image = encoded(photo(number % 50, chance.randint(2, 90), chance.randint(2, 90)), kind)
    text = f"damaged {number}".encode()
    giant = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(chance.randrange(256) for _ in range(8)) + image[24:]
    members = [
        {"jpg": flip_bits(image, chance), "txt": text},
        {"jpg": image[: chance.randrange(len(image))], "txt": text},
        {"jpg": bytes(chance.randrange(256) for _ in range(16)) + image[16:], "txt": text},
        {chance.choice(["png", "webp", "jpeg", "gif"]): image, "txt": text},
        {"png": giant, "txt": text},
        {"jpg": image, "json": flip_bits(json_bytes(caption="a caption", width=4), chance)},
        {"jpg": image, "txt": bytes(chance.randrange(256) for _ in range(20))},
        {"jpg": image},
        {"jpg": b"", "txt": text},
        {"jpg": encoded(np.zeros((1, 1, 3), np.uint8)), "txt": text},
        {"txt": text},
        {"mp4": image, "txt": text},
    ]
    key = f"d{number:05d}" if chance.random() < 0.9 else f"d{number - 1:05d}"  # some keys repeat
    return key, chance.choice(members)


def run_fuzz(folder: Path, count: int, seed: int, workers: int) -> None:
    chance = random.Random(seed)
    samples = [damaged(n, chance) for n in range(count)]
    samples += [(f"g{n:05d}", sample(n % 50)) for n in range(GOOD)]
    chance.shuffle(samples)
    half = len(samples) // 2
    write_tar(folder / "f-000.tar", samples[:half])
    write_tar(folder / "f-001.tar", samples[half:])
    made = source(f"{folder}/f-{{000..001}}.tar", batch=20, workers=workers, max_bad_fraction=1.0)
    steps = made.batches_per_epoch
    batches = take(made, steps)
    report = made.report()
    assert all(len(b) == 20 and b.slots.tolist() == list(range(20)) for b in batches)
    assert all(b.images.shape == (20, 16, 16, 3) for b in batches)
    assert report["delivered"] == 20 * steps
    assert report["read"] == report["delivered"] + sum(report["skipped"].values())
    assert set(report["skipped"]) >= {"corrupt image", "no image", "no caption", "image too small"}
    assert set(report["examples"]) == set(report["skipped"])


def test_damaged_samples(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 150, seed=1, workers=0)


@pytest.mark.slow
def test_two_thousand_damaged_samples(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 2000, seed=2, workers=2)


def test_damaged_tars_are_opened_or_named(tmp_path: Path) -> None:
    """Bit flips and truncations of whole tars, headers included."""
    from glide_ds.data.shards import open_shards
    from glide_ds.types import DataError

    chance = random.Random(3)
    whole = write_tar(tmp_path / "t.tar", [(f"{n}", sample(n)) for n in range(8)]).read_bytes()
    named = 0
    for number in range(60):
        path = tmp_path / f"x{number}.tar"
        data = bytearray(whole[: chance.randrange(600, len(whole))] if number % 2 else whole)
        for _ in range(chance.randint(0, 30)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            open_shards(str(path))
        except DataError as error:
            named += path.name in str(error)
            continue
    assert named >= 30
