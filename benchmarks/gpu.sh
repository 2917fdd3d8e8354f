#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and perhaps no network.
#
#   bash benchmarks/gpu.sh tests compiled_tf32+compiled_bf16@32 phases    sections in turn; joined by +: at once
#
# @32: with 32 images. Sections at once build and compile side by side, and take turns at measuring when all have.
#
# Results and logs go to $OUT (default: benchmarks/results). A folder .whl of wheels is installed first, if there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${OUT:-benchmarks/results} site=/tmp/site
card=${CARD:-$(python3 -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')}
size=${SIZE:-base} micro=${MICRO:-32} rounds=${ROUNDS:-7} # smaller ones to try the sections themselves
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false lock=/tmp/timing
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # for sections side by side
if [ -d .whl ]; then
  [ -d $site ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target $site .whl/*.whl
  export PYTHONPATH=$site:$PYTHONPATH
fi

tests() {
  flock -s $lock python3 -m pytest -q -n 4 tests/model/test_cuda.py tests/training/test_optimizer.py \
    tests/training/test_capturing.py -k "${TESTS:-cuda}"
}

step() {
  python3 benchmarks/step.py "$2" --size "$size" --rounds "$rounds" --micro "$micro" --lock $lock \
    --out "$out/step-$1-$micro-$card.json" "${@:3}"
}
eager() { step eager options --eager --only "plain eager" "+ channels_last" "+ DeepSpeed, fused AdamW" "+ AdamW8bit"; }
graph_eager() { step graph-eager options --eager --only "+ fp16 kernels" "+ CUDA graph" --profile; }
plain_tf32() { step plain-tf32 options --only "+ compile" --profile; }
compiled_tf32() { step compiled-tf32 options --only "+ fp16 kernels" "+ CUDA graph" --profile; }
compiled_bf16() { step compiled-bf16 options --only "+ bf16" "+ bf16, CUDA graph" --profile; }
phases() { step phases phases --eager; }
overhead() { step overhead overhead --eager; }
dials() { step dials dials --eager; }
parity() { (flock -s 9 && size=mid micro=8 step parity parity --eager) 9>$lock; }
optimizer() { python3 benchmarks/optimizer.py --device cuda --size 100000000 --out "$out/optimizer-$card.json"; }
memory() { flock -s $lock python3 benchmarks/memory.py --out "$out/memory-$card.json"; }

# A tiny model leaves a GPU idle: all seeds and optimizers at once, then one command that joins their results.
convergence() {
  local compare=(python3 benchmarks/convergence.py) work=/tmp/convergence seed variant
  "${compare[@]}" phase3 --work $work --seeds 0 --variants AdamW &
  local parents=$!
  for seed in 0 1 2; do for variant in AdamW AdamW8bit; do
    "${compare[@]}" base --work $work --seeds $seed --variants $variant &
  done; done
  wait $parents
  for seed in 0 1 2; do for variant in AdamW AdamW8bit; do
    "${compare[@]}" phase3 --work $work --seeds $seed --variants $variant &
  done; done
  wait
  "${compare[@]}" base --work $work --out "$out/convergence-base-$card.json" &
  "${compare[@]}" phase3 --work $work --out "$out/convergence-phase3-$card.json"
  wait
}

# launch/quickstart.sh without its installation.
quickstart() {
  local run=/tmp/quickstart glide=(python3 -c 'from glide_ds.cli import main; main()') tiny=ds_configs/tiny
  exec 9>$lock && flock -s 9
  python3 launch/train.py --ds_config $tiny/phase1.json $tiny/phase2.json $tiny/phase3.json --set run.dir=$run &&
    "${glide[@]}" export $run --out $run/export/model.pt &&
    "${glide[@]}" evaluate $run/export/model.pt --captions 64 --samples 128 --steps 50 --out "$out/quickstart-$card.json"
}

if [ "${1:-}" = --section ]; then
  [[ $2 = *@* ]] && micro=${2#*@}
  ${2%@*}
  exit
fi
for group in "$@"; do
  IFS=+ read -ra sections <<<"$group"
  for section in "${sections[@]}"; do
    { started=$SECONDS
      timeout "${LIMIT:-600}" bash benchmarks/gpu.sh --section "$section" >"$out/$section.log" 2>&1
      echo "== $section: exit code $?, $((SECONDS - started)) s"; } &
  done
  wait
  for section in "${sections[@]}"; do
    echo "-- $section"
    grep -v "^\[20\|^$" "$out/$section.log" | tail -"${TAIL:-25}"
  done
done
