"""Communication of one update under ZeRO-2, in bytes, against the theory; and what a second rank costs in time.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out benchmarks/results/scaling-cpu.json

Theory, per rank and update, for Ψ trained parameters of 4 bytes on W ranks: each micro-step reduces the gradients to
their owners, (W-1)/W·Ψ, and the update gathers the parameters, (W-1)/W·Ψ. Without accumulation that is the 2·Ψ of
the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, section 7.2.1); ZeRO-2 keeps no unreduced gradients, so
with A micro-steps it is (A+1)·Ψ.

DeepSpeed's default reduces every gradient to all ranks, not to its owner, and moves 3·Ψ; with
zero_optimization.use_multi_rank_bucket_allreduce = false it is 2·Ψ. Both are measured.

Counted twice. `collectives`: the bytes given to torch.distributed, times what a bandwidth-optimal algorithm sends of
them, which is NCCL's figure. `wire`: bytes that really left the ranks' sockets, from the counters of a network
namespace of their own (needs root; else left out). It shows what gloo's algorithms add: its
`reduce` ends by gathering the parts at the owner and sends as much as its all-reduce does.

Every rank has the same micro-batch whatever their number (weak scaling), batches are made beforehand, and a rank has
the threads that OMP_NUM_THREADS gives it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import environment
from torch import Tensor

TINY = Path(__file__).parents[1] / "ds_configs" / "tiny"
FILES = {"adapter_only": "phase1.json", "full": "phase3.json"}
WARM_UP = 2  # updates
# Of the larger tensor of each collective, the share that a rank sends, for W ranks.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda w: 2 * (w - 1) / w,
    "reduce": lambda w: (w - 1) / w,
    "broadcast": lambda w: (w - 1) / w,
    "all_gather": lambda w: (w - 1) / w,
    "all_gather_into_tensor": lambda w: (w - 1) / w,
    "reduce_scatter_tensor": lambda w: (w - 1) / w,
}


def count_collectives() -> Counter[str]:
    """Bytes per kind of collective from now on. Before DeepSpeed is imported: it keeps some of the functions."""
    counted: Counter[str] = Counter()

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor | list)]
            counted[name] += max(size_of(x) for x in given)
            return collective(*args, **kwargs)

        return call

    for name in SENT:
        setattr(dist, name, counting(name, getattr(dist, name)))
    return counted


def size_of(tensors: Tensor | list[Tensor]) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(t.nbytes for t in tensors)


def wire_bytes() -> int:
    """Sent through this namespace's loopback interface so far, by all ranks together."""
    line = next(x for x in Path("/proc/self/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def run_rank(case: dict[str, Any], updates: int, folder: Path) -> None:
    """One rank of one case; its figures go to FOLDER/rankN.json."""
    counted = count_collectives()
    from glide_ds.config import load_config
    from glide_ds.environment import read_environment
    from glide_ds.training.objective import Objective
    from glide_ds.training.setup import phase_run
    from glide_ds.training.zero.group import start_process_group

    rank, world_size = read_environment()
    device = start_process_group(600)
    batch = case["micro_batch"] * case["accumulation"] * world_size
    sets = [f"train_batch_size={batch}", f"train_micro_batch_size_per_gpu={case['micro_batch']}"]
    sets += [f"run.dir={folder / 'run'}", "model.weights=random", "log.tensorboard=false", "train.kl_weight=0"]
    sets += [f"zero_optimization.use_multi_rank_bucket_allreduce={str(case['all_reduce']).lower()}"]
    (config,) = load_config(TINY / FILES[case["phase"]], None, sets)
    with phase_run(config, device) as run:
        objective = Objective(config, run.diffusion, run.engine, run.clip)
        source = run.source.batches(0)
        batches = [next(source).to(device) for _ in range(case["accumulation"])]
        times = []
        for step in range(WARM_UP + updates):
            if step == WARM_UP:
                dist.barrier()
                before, sent = Counter(counted), wire_bytes()
            start = time.perf_counter()
            for micro_batch in batches:
                run.engine.backward(objective(micro_batch, step).total)
                run.engine.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        dist.barrier()
        figures = {
            "seconds": statistics.median(times[WARM_UP:]),
            "bytes_given": {k: (v - before[k]) / updates for k, v in counted.items() if v > before[k]},
            "wire": (wire_bytes() - sent) / updates / world_size,
            # The same data in every case of a phase and batch: equal norms show equal updates.
            "grad_norms": {role: float(norm) for role, norm in run.engine.role_clipping.norms.items()},
            "parameters": sum(p.numel() for group in run.engine.optimizer.bit16_groups for p in group),
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def can_isolate() -> bool:
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def launch(case: dict[str, Any], updates: int, folder: Path, isolated: bool) -> dict[str, Any]:
    """All ranks of a case in a namespace of their own, whose loopback carries nothing else."""
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, "--case", json.dumps(case), "--updates", str(updates)]
    command += ["--work", str(folder)]
    if isolated:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout[-5000:])
    ranks = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(case["ranks"])]
    return evaluated(case, ranks, isolated)


def spawn_ranks(case: dict[str, Any], command: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(case["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(case["ranks"])
    ]
    if any([rank.wait() for rank in ranks]):
        sys.exit(1)


def evaluated(case: dict[str, Any], ranks: list[dict[str, Any]], isolated: bool) -> dict[str, Any]:
    """The case with its figures: bytes that a rank sends per update, as fractions of 4·Ψ·(W-1)/W too."""
    world_size, parameters = case["ranks"], ranks[0]["parameters"]
    row = {**case, "parameters": parameters, "seconds": max(rank["seconds"] for rank in ranks)}
    row |= {"grad_norms": ranks[0]["grad_norms"]}
    if world_size == 1:
        return row
    theory = (case["accumulation"] + 1) * 4 * parameters * (world_size - 1) / world_size
    given = ranks[0]["bytes_given"]
    counted = sum(size * SENT[name](world_size) for name, size in given.items())
    row |= {"theory_bytes": theory, "given_to_collectives": given, "collectives_bytes": counted}
    row |= {"collectives_over_theory": counted / theory}
    if isolated:
        row |= {"wire_bytes": ranks[0]["wire"], "wire_over_theory": ranks[0]["wire"] / theory}
    return row


def cases(micro_batch: int) -> list[dict[str, Any]]:
    rows = [
        {"phase": phase, "accumulation": accumulation, "ranks": ranks, "all_reduce": False}
        for phase in FILES
        for accumulation in (1, 4)
        for ranks in (1, 2)
    ]
    # DeepSpeed's default, for comparison: every gradient is reduced to all ranks instead of to its owner.
    rows += [{"phase": "full", "accumulation": 1, "ranks": 2, "all_reduce": True}]
    return [{**row, "micro_batch": micro_batch} for row in rows]


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'phase':14}{'accum':>6}{'ranks':>6}  {'reduction':10}{'ms':>8}{'efficiency':>11}", end="")
    print(f"{'theory':>10}{'collectives':>13}{'wire':>8}   (MB sent per rank and update; shares of theory)")
    alone = {(r["phase"], r["accumulation"]): r["seconds"] for r in rows if r["ranks"] == 1}
    for row in rows:
        row["efficiency"] = alone[row["phase"], row["accumulation"]] / row["seconds"]
        reduction = "to all" if row["all_reduce"] else "to owner"
        print(f"{row['phase']:14}{row['accumulation']:6}{row['ranks']:6}  {reduction:10}", end="")
        print(f"{row['seconds'] * 1e3:8.0f}{row['efficiency']:11.1%}", end="")
        if "theory_bytes" in row:
            print(f"{row['theory_bytes'] / 1e6:10.2f}{row['collectives_over_theory']:13.4f}", end="")
            print(f"{row['wire_over_theory']:8.4f}" if "wire_over_theory" in row else "", end="")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--updates", type=int, default=5, help="measured updates per case (default 5)")
    parser.add_argument("--micro_batch", type=int, default=4, help="images per rank and micro-step (default 4)")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"), help="an empty folder for the runs")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case and "RANK" in os.environ:
        run_rank(args.case, args.updates, args.work)
    elif args.case:
        spawn_ranks(args.case, [sys.executable, *sys.argv])
    else:
        isolated = can_isolate()
        rows = []
        for number, case in enumerate(cases(args.micro_batch)):
            rows.append(launch(case, args.updates, args.work / str(number), isolated))
            print(f"case {number + 1} of {len(cases(args.micro_batch))} done", flush=True)
        report(rows)
        if args.out:
            args.out.write_text(json.dumps({"environment": environment("cpu"), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
