"""The checks, as a table. Each looks at one thing, says what it saw, and names every fault it finds.

To add one, write a function from Site to Finding and give it a line in CHECKS. A GlideError that a check raises is
its fault.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from glide_ds.config import Config, DataConfig, cache_dir, is_built_in
from glide_ds.data.clip_notes import encoders
from glide_ds.data.clip_store import Embeddings
from glide_ds.data.filters import Filtered
from glide_ds.data.loader import Layout
from glide_ds.data.pictures.decode import Cropping
from glide_ds.data.samples import SampleSet, ShardSamples, open_samples
from glide_ds.data.streams.reading import Reading, stream_plan, stream_urls
from glide_ds.data.tally import Tally, Unusable
from glide_ds.data.tars.catalog import Entry, by_threads, look
from glide_ds.data.tars.index import open_index
from glide_ds.data.tars.patterns import existing
from glide_ds.data.tars.storage import CacheOptions, Storage
from glide_ds.errors import CheckpointError, ConfigError, DataError, Fault, GlideError, WeightsError
from glide_ds.files import sync_directory
from glide_ds.model import create_model
from glide_ds.model.clip import FrozenClip
from glide_ds.preflight import ranks, step
from glide_ds.preflight.site import BlockedError, Finding, Site, failed, faults_of
from glide_ds.training.checkpoint.commit import committed, no_manifest, unreadable, verify
from glide_ds.training.checkpoint.start import find_start, folder_of, load_start
from glide_ds.training.faults.stopping import STOP_FILE
from glide_ds.training.preview import describe_batch
from glide_ds.training.run import check_pipeline
from glide_ds.training.setup import glide_config
from glide_ds.training.speed.fitting import USABLE, fit, host_memory
from glide_ds.training.speed.memory import (
    checkpoint_bytes,
    checkpoints_kept,
    frozen_masters,
    gib,
    memory_estimate,
    snapshot_bytes,
    snapshots_left,
)
from glide_ds.training.speed.meta import meta_model
from glide_ds.types import Batch, GlideConfig

PROBE_BYTES = 32 * 2**20
WORTHLESS = 0.9  # a larger share of samples that the filter drops is a mistake in the filter


class Check(NamedTuple):
    """One line of the report."""

    name: str
    look: Callable[[Site], Finding]
    everywhere: bool = False  # on every rank of a launch; else on rank 0 alone


# ---- the configuration


def pipeline(site: Site) -> Finding:
    check_pipeline(site.configs)
    return Finding(f"{' → '.join(config.train.phase for config in site.configs)} in {site.config.run.dir}")


def batch(site: Site) -> Finding:
    texts: list[str] = []
    faults: list[Fault] = []
    for config in site.configs:
        try:
            texts.append(describe_batch(config, config.batch_arithmetic(site.world_size)))
        except ConfigError as error:
            faults += faults_of(error)
    return Finding("; ".join(dict.fromkeys(texts)), tuple(dict.fromkeys(faults)))


def _glide(config: Config) -> GlideConfig:
    """The architecture to build, where `clip` knows the encoder's width."""
    try:
        return glide_config(config)
    except GlideError:
        raise BlockedError("the width of the CLIP embeddings is unknown (see clip)") from None


# ---- the machines


def hosts(site: Site) -> Finding:
    """Every name that the run will look up; an unknown MASTER_ADDR is retried for minutes in silence."""
    names: dict[str, str] = {}
    if site.hostfile:
        names = {name: f"--hostfile {site.hostfile}" for name, _ in read_hostfile(site.hostfile)}
    if master := os.environ.get("MASTER_ADDR"):
        names[master] = "MASTER_ADDR"
    faults = []
    for name, origin in names.items():
        site.progress(f"looking {name} up")
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            faults.append(
                Fault(
                    f"{origin} names the host {name!r}, which {site.host} can't look up ({error.strerror})",
                    remedy="correct the name, or add it to DNS or /etc/hosts on every node",
                )
            )
    return Finding(f"{', '.join(names)} resolve" if names else "one machine: no name to look up", tuple(faults))


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """(host, slots) of DeepSpeed's hostfile: lines such as `node17 slots=8`."""
    try:
        lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    except OSError as error:
        raise ConfigError(
            f"--hostfile {path} can't be read ({error.strerror})", remedy="correct the path"
        ) from error
    found = []
    for words in filter(None, lines):
        name, *rest = words
        slots = rest[0].removeprefix("slots=") if len(rest) == 1 and rest[0].startswith("slots=") else ""
        if not slots.isdigit():
            raise ConfigError(
                f"--hostfile {path} has the line {' '.join(words)!r}, which DeepSpeed can't read",
                remedy="write 'HOST slots=N'",
            )
        found.append((name, int(slots)))
    if not found:
        raise ConfigError(f"--hostfile {path} names no host", remedy="write one line 'HOST slots=N' per node")
    return found


def memory(site: Site) -> Finding:
    """The estimate of every phase against the smallest GPU, or this machine's free memory shared by its ranks."""
    needs, on_host = {}, []
    for config in site.configs:
        try:
            arithmetic = config.batch_arithmetic(site.world_size)
        except ConfigError:
            raise BlockedError("the batch can't be split (see batch)") from None
        site.progress(f"counting phase {config.train.phase}")
        model = meta_model(_glide(config), config)
        cpu = site.device.type == "cpu"
        dial: str = config.train.recompute
        if dial == "auto":
            dial = fit(model, config, arithmetic, USABLE * _memory_per_rank(site), cpu=cpu).dial
        parts = memory_estimate(model, config, arithmetic, dial, cpu=cpu)
        copy = snapshot_bytes(model, config, site.world_size)
        on_host.append(copy + frozen_masters(model, config))
        needs[config.train.phase] = sum(parts.values()) + (copy if cpu else 0)
    phase, need = max(needs.items(), key=lambda item: item[1])
    text = f"phase {phase} takes about {gib(need)} per rank"
    have, host = _memory_per_rank(site), host_memory()
    if max(on_host) > host and site.device.type != "cpu":
        fact = f"rank 0 keeps {gib(max(on_host))} in host memory for its saves, but {site.host} has {gib(host)} free"
        return Finding(text, (Fault(fact, remedy="set checkpoint.async_save=false, or use more ranks"),))
    if need <= have:
        return Finding(f"{text}, {gib(have)} are free")
    fault = Fault(
        f"{text}, but {site.host} has {gib(have)} free for each",
        remedy="lower train_micro_batch_size_per_gpu, set train.recompute, or use the optimizer AdamW8bit; "
        "`glide-ds plan` shows what each would give",
    )
    return Finding(text, (fault,))


def _memory_per_rank(site: Site) -> float:
    if site.device.type == "cuda":
        return float(torch.cuda.mem_get_info(site.device)[0])
    return host_memory() / site.gpus


# ---- the data


def shards(site: Site) -> Finding:
    """Every shard is there, whole, and as it was when its index was made; indexes that are missing are made."""
    faults: list[Fault] = []
    count = samples = streams = 0
    for data, patterns in _data_sets(site):
        if is_built_in(patterns):
            continue
        if data.reader == "stream":
            streams += len(stream_urls(patterns))
            continue
        urls, errors = existing(patterns)  # one missing shard does not hide what ails the others
        faults += (fault for lost in errors for fault in faults_of(lost))
        count += len(urls)
        found, more = _shards_of(urls, data, site) if urls else (0, [])
        samples, faults = samples + found, faults + more
    texts = [f"{count:,} shards whole, {samples:,} samples"] if count else []
    texts += [f"{streams:,} streams, whose ends show when they are read"] if streams else []
    text = "; ".join(texts) or f"{site.config.data.shards}: drawn on the fly"
    return Finding(text, tuple(faults))


def _shards_of(urls: list[str], data: DataConfig, site: Site) -> tuple[int, list[Fault]]:
    """(samples, faults) of shards that are there: as a start finds them, and where it would stop, of each one."""
    storage = _storage(data)
    try:
        known: list[Entry | GlideError] = [*look(urls, storage, data.index_dir)]
    except GlideError:

        def entry(url: str) -> Entry | GlideError:
            try:
                return Entry.of(open_index(url, storage, data.index_dir).head)
            except GlideError as error:
                return error

        known = []
        for each in by_threads(entry, urls):
            known.append(each)
            site.progress(f"{len(known)} of {len(urls)} shards")
    samples = 0
    faults: list[Fault] = []
    for url, each in zip(urls, known, strict=True):
        if isinstance(each, GlideError):
            faults += faults_of(each)
        elif each.damage and data.damaged_shards != "salvage":
            fact = f"shard {url} is damaged: {'; '.join(each.damage)}"
            remedy = "fetch it again, or set data.damaged_shards=salvage to train on the members that are whole"
            faults.append(Fault(fact, "samples would be missing", remedy))
        else:
            samples += each.samples
    return samples, faults


def _data_sets(site: Site) -> Iterator[tuple[DataConfig, str | tuple[str, ...]]]:
    """Each set of shards once, however many phases and mixes read it."""
    seen = set()
    for config in site.configs:
        for part in config.data.mix_parts:
            key = (part.shards, config.data.index_dir, config.data.damaged_shards)
            if key not in seen:
                seen.add(key)
                yield config.data, part.shards


def _storage(data: DataConfig) -> Storage:
    return Storage(CacheOptions(data.cache_dir or str(cache_dir() / "blocks"), int(data.cache_gb * 2**30)))


def samples(site: Site) -> Finding:
    """Decode pictures spread over the whole set, as the loader will, and read their captions."""
    faults: list[Fault] = []
    texts = []
    datas: list[DataConfig] = []
    datas += (config.data for config in site.configs if config.data not in datas)
    for data in datas:
        if data.reader == "stream":
            text, more = _read(data, site)
            texts.append(text)
            faults += more
            continue
        try:
            opened = open_samples(data, site.config.model.architecture.image_size)
        except GlideError:
            texts.append("the shards can't be opened (see shards)")
            continue
        text, more = _decode(opened, data, site)
        texts.append(text)
        faults += more
    return Finding("; ".join(texts), tuple(faults), skipped=not faults and all("can't be" in t for t in texts))


def _decode(opened: SampleSet, data: DataConfig, site: Site) -> tuple[str, list[Fault]]:
    tally, example, started = Tally(), "", time.monotonic()
    numbers = np.unique(np.linspace(0, len(opened) - 1, site.samples).astype(int)).tolist()
    for number in numbers:
        site.progress(f"decoding: {tally.read} of {len(numbers)}")
        tally.read += 1
        try:
            sample = opened.load(number, 0.0)
        except Filtered as finding:
            tally.filtered[finding.cause] += 1
        except Unusable as finding:
            tally.skip(finding.cause, f"{opened.name(number)}: {finding.detail or finding.cause}")
        else:
            tally.delivered += 1
            example = example or sample.caption
    return _verdict(tally, example, time.monotonic() - started, data)


def _read(data: DataConfig, site: Site) -> tuple[str, list[Fault]]:
    """The first samples of the first stream, as the loader will read them."""
    started, count = time.monotonic(), max(1, site.samples)
    layout = Layout(site.config.model.architecture.image_size, 1, count, count, 0, 1, 0)
    plan = stream_plan(data.changed("data", shuffle=False), layout)
    made = next(iter(Reading(plan, 0)))
    if made.error:
        return "the streams can't be read", [*faults_of(made.error)]
    example = made.batch.captions[0] if isinstance(made.batch, Batch) else ""
    made.tally.delivered = len(made.batch) if isinstance(made.batch, Batch) else 0
    return _verdict(made.tally, example, time.monotonic() - started, data)


def _verdict(tally: Tally, example: str, seconds: float, data: DataConfig) -> tuple[str, list[Fault]]:
    each = seconds / max(1, tally.read) * 1000
    text = (
        f"{tally.delivered} of {tally.read} usable, {tally.filtered.total()} filtered, {tally.bad} broken, "
        f"{each:.1f} ms each; {example[:40]!r}"
    )
    faults = []
    if tally.bad > data.max_bad_fraction * tally.read:
        shown = "; ".join(names[0] for names in tally.examples.values())
        faults.append(
            Fault(
                f"{tally.bad} of {tally.read} samples are unusable, more than data.max_bad_fraction="
                f"{data.max_bad_fraction}: {tally.describe()}. For example {shown}",
                remedy="mend the data, or raise data.max_bad_fraction",
            )
        )
    if tally.filtered.total() > WORTHLESS * tally.read:
        faults.append(
            Fault(
                f"data.filter drops {tally.filtered.total()} of {tally.read} samples: {tally.describe()}",
                remedy="loosen data.filter, or check that the records carry the fields that it reads",
            )
        )
    return text, faults


def clip(site: Site) -> Finding:
    """The frozen encoder loads, and data.clip_store was made by it from these samples."""
    config = next((config for config in site.configs if config.uses_clip), None)
    if config is None:
        return Finding("the phase does without CLIP")
    frozen = FrozenClip(
        config.clip.model, config.clip.weights, source="both" if config.clip.pictured else "text"
    )
    text = f"{config.clip.model} loads"
    if config.data.clip_store is None:
        return Finding(f"{text}; embeddings are computed while training")
    try:
        opened = open_samples(config.data, config.model.architecture.image_size)
    except GlideError:
        return Finding(f"{text}; the shards can't be opened (see shards), so the store is not checked")
    if not isinstance(opened, ShardSamples):
        raise DataError(
            f"data.clip_store={config.data.clip_store} can't go with {config.data.shards}, which has no shards",
            remedy="unset it",
        )
    made_by = encoders(config.clip, Cropping(config.data.crop, config.data.trim))
    store = Embeddings(config.data.clip_store, opened.shards, made_by)
    store.check_captions(config.data.captions)
    store.of_weights(frozen.weights_hash)
    for sample in np.unique(np.linspace(0, len(opened) - 1, site.samples).astype(np.int64)):
        for source in store.stores:
            pictured = source == "image"
            with suppress(Unusable):  # which the shards' own check counts
                store.rows(sample[None], [opened.hash(int(sample), pictured=pictured)], np.array([pictured]))
    return Finding(f"{text}; {config.data.clip_store} fits, {store.dim}-d")


# ---- the run directory


def resume(site: Site) -> Finding:
    """What the same command would go on from; every file of its newest checkpoint is read."""
    texts: list[str] = []
    faults: list[Fault] = []
    for config in site.configs:
        try:
            find_start(config, [c.train.phase for c in site.configs], verify=False)
        except (ConfigError, CheckpointError) as error:
            faults += faults_of(error)
        except WeightsError:
            pass  # `weights` says it
        phase, damaged = config.train.phase, []
        folder = folder_of(config, phase)
        damaged += [(path, [no_manifest(path)]) for path in unreadable(folder)]
        for candidate in committed(folder):
            site.progress(f"reading {candidate.path}")
            if not (problems := verify(candidate)):
                texts.append(f"{phase} goes on at step {candidate.step} of {config.train.steps}")
                break
            damaged.append((candidate.path, problems))
        faults += [
            Fault(
                f"the checkpoint {path} is damaged: {'; '.join(problems[:3])}; the run would fall back to an older "
                "one",
                remedy=f"put the file back, or remove {path} to accept that",
            )
            for path, problems in damaged
        ]
    stop = Path(site.config.run.dir) / STOP_FILE
    if stop.exists():
        faults.append(Fault(f"{stop} is there: the run would stop at its first step", remedy=f"remove {stop}"))
    return Finding("; ".join(texts) or "nothing yet: the run starts from its beginning", tuple(faults))


def weights(site: Site) -> Finding:
    """The first phase's weights go into its model, name by name."""
    config = site.config
    try:
        start = find_start(config, verify=False)
    except ConfigError:
        raise BlockedError("the run directory belongs to another configuration (see resume)") from None
    except CheckpointError:
        raise BlockedError("no checkpoint of the run directory is whole (see resume)") from None
    if start.resumed:
        return Finding(f"from {start.resumed.path}")
    model = create_model(_glide(config))
    for later in site.configs[1:]:
        find_start(later, [c.train.phase for c in site.configs], verify=False)
    return Finding(" ".join(load_start(model, config, start)))


def disk(site: Site) -> Finding:
    """Room for the checkpoints that are kept and the one being written, for every phase of the pipeline."""
    folder = existing_parent(Path(site.config.run.dir))
    need, sizes = 0.0, []
    for config in site.configs:
        model = meta_model(_glide(config), config)
        size, (snapshots, each) = checkpoint_bytes(model, config), snapshots_left(model, config)
        need += size * checkpoints_kept(config) + each * snapshots
        averages = f" and {snapshots} x {gib(each)} of averages" if snapshots else ""
        sizes.append(f"{config.train.phase} {checkpoints_kept(config)} x {gib(size)}{averages}")
    held = sum(
        p.stat().st_size
        for c in site.configs
        for p in folder_of(c, c.train.phase).glob("**/step-*/*")
        if p.is_file()
    )
    free = shutil.disk_usage(folder).free
    text = f"checkpoints take up to {gib(need)} ({', '.join(sizes)}), {gib(free + held)} are free in {folder}"
    if need <= free + held:
        return Finding(text)
    return failed(text, "free space, choose another run.dir, or lower checkpoint.keep")


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def write(site: Site) -> Finding:
    """What a commit does: write, sync, rename a file over another and a folder."""
    folder = Path(site.config.run.dir)
    probe = folder / f".preflight-{uuid.uuid4().hex[:12]}"
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        with (probe / "new").open("wb") as file:
            file.write(os.urandom(2**20) * (PROBE_BYTES // 2**20))
            file.flush()
            os.fsync(file.fileno())
        (probe / "old").touch()
        (probe / "new").replace(probe / "old")
        (probe / "folder").mkdir()
        (probe / "folder").rename(probe / "renamed")
        sync_directory(probe)
    except OSError as error:
        fact = f"run.dir {folder} can't hold checkpoints on {site.host}: {error.strerror} ({error.filename})"
        return failed(fact, "choose another run.dir, mend its permissions, or free space")
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    seconds = time.monotonic() - started
    return Finding(f"{folder}: written, synced and renamed at {PROBE_BYTES / seconds / 1e6:,.0f} MB/s")


CHECKS = (
    Check("phases", pipeline),
    Check("batch", batch),
    Check("hosts", hosts, everywhere=True),
    Check("resume", resume),
    Check("weights", weights),
    Check("clip", clip),
    Check("shards", shards),
    Check("samples", samples, everywhere=True),
    Check("memory", memory, everywhere=True),
    Check("disk", disk),
    Check("write", write, everywhere=True),
    Check("shared", ranks.shared_folder, everywhere=True),
    Check("clocks", ranks.clocks, everywhere=True),
    Check("network", ranks.network, everywhere=True),
    Check("step", step.real_step, everywhere=True),
)
