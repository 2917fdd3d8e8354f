#!/usr/bin/env bash
# From a fresh machine to pictures, in minutes on two CPU cores or one GPU, with nothing prepared: install,
# fine-tune the built-in tiny GLIDE on drawn shapes through all three phases on two processes, export, verify,
# draw, judge, report.
#
#   bash launch/quickstart.sh [RUN_DIRECTORY]      default: runs/quickstart; the same again continues it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${1:-runs/quickstart}
started=$SECONDS

say() { printf '\n== %3d s: %s\n' $((SECONDS - started)) "$*"; }

say "installing into .venv"
bash launch/env.sh --extras report
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

say "training phases 1 to 3 on two processes, into $run"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus == 1 ? 1 : 2)) # NCCL takes one process per GPU
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu # else every command of DeepSpeed's warns that it sees no GPU
deepspeed --quiet --num_gpus $processes launch/train.py \
  --ds_config ds_configs/tiny/phase1.json ds_configs/tiny/phase2.json ds_configs/tiny/phase3.json \
  --set run.dir="$run"

say "exporting the last phase, and phase 1 for comparison"
glide-ds export "$run" --out "$run/export/model.pt"
glide-ds export "$run" --phase adapter_only --out "$run/export/phase1.pt"

say "measuring the loss before, and what CLIP contributes after phase 1"
glide-ds evaluate "$run/export/phase1.pt" --captions 0 --samples 128 --out "$run/phase1.json"

say "drawing 64 held-out cases by caption, by CLIP and by both, and reading the pictures"
glide-ds evaluate builtin:tiny --captions 64 --samples 128 --steps 25 --out "$run/before.json"
glide-ds evaluate "$run/export/model.pt" --captions 64 --samples 128 --steps 25 --pictures "$run/pictures.png" --out "$run/phase3.json"

glide-ds report "$run" --evaluation "$run"/{before,phase1,phase3}.json --out "$run/report.html"

say "done: look at $run/report.html and $run/pictures.png, or: tensorboard --logdir $run/tensorboard"
