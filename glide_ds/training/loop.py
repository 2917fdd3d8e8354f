"""The training loop. Setup lives in setup.py, what is computed in objective.py, what is shown in logging.py."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.distributed as dist

from glide_ds.training.checkpoint.start import lineage
from glide_ds.training.metrics import Clock, Meter, data_report
from glide_ds.training.objective import Objective
from glide_ds.training.phases import gate_offset, hash64, phase_seed
from glide_ds.training.setup import PhaseRun
from glide_ds.training.zero import stored


def train(run: PhaseRun) -> None:
    """Take the phase from its start to its last step."""
    config, engine, steps = run.config, run.engine, run.config.train.steps
    objective = Objective(config, run.diffusion, engine, run.clip)
    clock, watch = Clock(), run.watch
    first_offset = _first_gate_offset(run)
    run.validation.begin()
    batches = run.source.batches(run.start.step + run.guard.data_offset)
    for step in range(run.start.step, steps):
        if run.validation.exhausted:
            break
        if run.stopper.agreed(step):
            if step > run.start.step and step % config.checkpoint.every:  # else it is saved, or as it was found
                save(run, step, first_offset)
            break
        run.tracer.at(step)
        _prepare(run, step, first_offset)
        meter, seen, timesteps = Meter(run.diffusion.num_timesteps, run.device), [], []
        run.guard.watch(meter)
        for _ in range(run.arithmetic.accumulation):
            watch.at("data", step)
            with clock.waiting():
                batch = next(batches)
            watch.at("forward", step)
            losses = objective(batch.to(run.device), step)
            meter.add(losses)
            watch.at("backward", step)
            engine.backward(losses.total)
            watch.at("step", step)
            engine.step()
            seen.append(batch)
            timesteps.append(losses.timesteps)
        for average in run.averages:
            average.update()
        clock.steps += 1
        done = step + 1
        last = done == steps
        skipped = run.guard.settle(done, seen)
        watch.at("log", done)
        run.log.trace_step(done, seen, timesteps)
        with clock.paused():
            measured = run.validation.after(done)
        recorded = done % config.log.every == 0 or last or done == 1 or skipped or measured
        shown = recorded or step == run.start.step  # a resumed run says at once that it goes on
        run.log.step(done, run.readings.read(done, meter, clock) if shown else None, recorded)
        if done % config.checkpoint.every == 0 or last or run.validation.ends:
            with clock.paused():
                save(run, done, first_offset)
            run.validation.check(done, run.guard.stop)
        if config.log.samples_every and (done % config.log.samples_every == 0 or last):
            with clock.paused():
                run.sampler.draw(done)
    watch.at("save", run.saver.step)
    run.saver.finish()


def _prepare(run: PhaseRun, step: int, first_offset: float) -> None:
    """The state that update `step` (0-based) depends on and no checkpoint needs to hold."""
    run.engine.train()
    # Dropout masks follow from (seed, step, rank): a resumed run draws what an uninterrupted one does.
    torch.manual_seed(hash64(phase_seed(run.config), step, dist.get_rank()))
    if run.clip is not None:
        run.model.clip_gate_offset.fill_(gate_offset(run.config, first_offset, step))


def _first_gate_offset(run: PhaseRun) -> float:
    """Where the phase's gate ramp began: the parent's offset, kept in the manifest over resumes."""
    if run.clip is None:
        return 0.0
    if run.start.resumed:
        return float(run.start.resumed.manifest["first_gate_offset"])
    return float(run.model.clip_gate_offset)


def save(run: PhaseRun, done: int, first_offset: float) -> None:
    """Save a checkpoint, to be committed in the background, and say what became of the data so far. Collective."""
    run.watch.at("save", done)
    facts = {
        "phase": run.config.train.phase,
        "model": asdict(run.model.config),
        "schedule": run.config.model.noise_schedule,
        "clip": run.config.clip.model_dump() if run.clip is not None else None,
        "pictures": {"crop": run.config.data.crop, "trim": run.config.data.trim},
        "lineage": lineage(run.config),
        "first_gate_offset": first_offset,
        "samples_seen": done * run.arithmetic.global_batch,
        "data_fingerprint": run.source.fingerprint,
        "data_epoch": run.source.began,
        "stability": run.guard.facts(),
        **run.validation.facts(),
        "engine": stored.facts(run.engine),
    }
    report = data_report(run.source)
    files = stored.files(run.engine)
    for average in run.averages:
        files |= average.files()
        facts |= average.facts(done)
    run.saver.save(done, facts, files, then=lambda: run.log.data_report(report))
