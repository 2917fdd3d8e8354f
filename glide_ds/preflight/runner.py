"""Run the checks one after the other and show them on one screen."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glide_ds.config import load_configs
from glide_ds.environment import is_launched, ranks_here, read_environment
from glide_ds.errors import EXIT_MISTAKE, Fault, GlideError
from glide_ds.masking import masked
from glide_ds.preflight.checks import CHECKS, Check, hosts, read_hostfile
from glide_ds.preflight.site import BlockedError, Finding, Site, faults_of
from glide_ds.progress import columns
from glide_ds.training.zero.group import start_process_group

MARKS = {"ok": "\033[32mok\033[0m  ", "FAIL": "\033[31mFAIL\033[0m", "skip": "skip"}


def main(args: argparse.Namespace) -> int:
    """The whole command on this rank; the exit code."""
    site = open_site(args)
    if site.rank == 0:
        print(f"for {site.nodes} node(s) x {site.gpus} rank(s), checked by {site.ranks} rank(s)", flush=True)
    started = time.monotonic()
    missing = missing_folders(Path(site.config.run.dir))
    if hosts(site).faults and site.ranks > 1:  # joining would wait for minutes
        failed = [
            check.name for check in CHECKS if check.look is hosts and not show(check, site, together=False)
        ]
    else:
        read_environment()
        site = replace(site, device=start_process_group(site.config.run.timeout_s))
        try:
            failed = [check.name for check in CHECKS if not show(check, site)]
        finally:
            dist.destroy_process_group()
    if site.rank == 0:
        for folder in missing:  # a look leaves nothing behind
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        verdict = (
            f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}" if failed else "all is well"
        )
        print(f"{verdict}, {time.monotonic() - started:.0f} s", flush=True)
        if not failed:
            print(f"Next: deepspeed --num_gpus {site.gpus} launch/train.py {_asked(args)}", flush=True)
    return EXIT_MISTAKE if failed else 0


def _asked(args: argparse.Namespace) -> str:
    """The arguments by which training is asked for the same."""
    words = ["--ds_config", *args.ds_config]
    words += ["--config", args.config] if args.config else []
    words += ["--set", *args.set] if args.set else []
    return masked(shlex.join(words))


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist yet, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def open_site(args: argparse.Namespace) -> Site:
    """The run that the arguments describe; under a launcher its ranks are the run's."""
    configs = load_configs(args.ds_config, args.config, args.set)
    rank, ranks = read_environment() if is_launched() else (0, 1)
    nodes, gpus = args.nodes, args.gpus
    if args.hostfile:
        listed = read_hostfile(args.hostfile)
        nodes, gpus = nodes or len(listed), gpus or min(slots for _, slots in listed)
    if nodes is None and ranks > 1:
        here = ranks_here() or gpus or ranks
        nodes, gpus = max(1, ranks // here), gpus or here
    gpus = gpus or max(1, torch.cuda.device_count())
    terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return Site(
        configs, nodes or 1, gpus, args.hostfile, args.samples, not args.no_step, rank, ranks, terminal=terminal
    )


def show(check: Check, site: Site, together: bool = True) -> bool:
    """Run one check on its ranks and print what they found; False where it failed. Collective if `together`."""
    started = time.monotonic()
    site.progress(check.name)
    finding = look(check, site) if check.everywhere or site.rank == 0 else Finding("")
    findings: list[Any] = [finding]
    if together:
        findings = [None] * site.ranks
        dist.all_gather_object(findings, finding)
    merged = merge(findings)
    if site.rank == 0:
        print(describe(check.name, merged, time.monotonic() - started, site.terminal), flush=True)
    return not merged.faults


def look(check: Check, site: Site) -> Finding:
    """A check's finding; what it raises is its fault, so that the other checks still run."""
    try:
        return check.look(site)
    except BlockedError as reason:
        return Finding(str(reason), skipped=True)
    except (GlideError, OSError, RuntimeError) as error:  # RuntimeError: torch's, such as out of memory
        return Finding("", faults_of(error))


def merge(findings: list[Finding]) -> Finding:
    """Every rank's finding as one: rank 0's words, and each fault once, with the first rank that has it."""
    faults: dict[Fault, int] = {}
    for rank, finding in enumerate(findings):
        for fault in finding.faults:
            faults.setdefault(fault, rank)
    told = tuple(f._replace(fact=f"rank {rank}: {f.fact}") if rank else f for f, rank in faults.items())
    return Finding(findings[0].text, told, findings[0].skipped)


def describe(name: str, finding: Finding, seconds: float, terminal: bool) -> str:
    """A line for the check, and below it each fault with its remedy."""
    state = "FAIL" if finding.faults else "skip" if finding.skipped else "ok"
    mark, width = MARKS[state] if terminal else f"{state:<4}", columns(most=110) - 7
    texts = [masked(str(fault._replace(remedy=""))) for fault in finding.faults] or [masked(finding.text)]
    lines = []
    for number, text in enumerate(texts):
        first = f"{name:<8}{seconds:5.1f} s  " if number == 0 else " " * 17
        lines += textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=" " * 17, break_long_words=False
        )
        if finding.faults:
            lines += textwrap.wrap(
                f"→ {masked(finding.faults[number].remedy)}",
                width,
                initial_indent=" " * 17,
                subsequent_indent=" " * 19,
                break_long_words=False,
            )
    clear = "\r\033[K" if terminal else ""
    return clear + f"  {mark} " + "\n       ".join(lines)
