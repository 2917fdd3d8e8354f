#!/usr/bin/env bash
# Make or refresh the project's .venv, on a CPU or GPU machine. Run it as often as you like: with nothing
# changed it ends within a fraction of a second.
#
#   bash launch/env.sh                  what training needs
#   bash launch/env.sh --extras test    and what the tests need; several: --extras evaluate,report
#
# uv does the work and is fetched by pip where it is absent. Its own settings apply: UV_PYTHON=3.12 picks a
# Python, UV_DEFAULT_INDEX a registry, UV_TORCH_BACKEND=cu128 the PyTorch build for an older GPU driver.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
stamp=$venv/.glide_ds-installed # line 1: what was installed from, line 2: the extras
oldest=3.11

say() { echo "env: $*"; }
die() {
  printf 'env: %s\n' "$@" >&2
  exit 1
}

# The private copy of uv comes last: one that the user keeps is newer or chosen.
find_uv() {
  local candidate
  for candidate in uv "${HOME:-/nonexistent}/.local/bin/uv" "$root/.uv/bin/uv"; do
    if "$candidate" --version >/dev/null 2>&1; then
      uv=$candidate
      return
    fi
  done
  return 1
}

# Into .uv of the project, so that nothing outside it changes: pip refuses to install into an externally
# managed Python (PEP 668), but not into a directory or a private venv.
bootstrap_uv() {
  local python
  python=$(command -v python3 || command -v python) ||
    die "no Python found: install Python $oldest or newer (Debian, Ubuntu: apt-get install python3 python3-venv)"
  export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 # the target is no system directory
  say "fetching uv with pip into .uv/"
  rm -rf "$root/.uv"
  if "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m pip install --quiet --target "$root/.uv" uv && return
  elif "$python" -m venv "$root/.uv" >/dev/null 2>&1; then
    "$root/.uv/bin/python" -m pip install --quiet uv && return
  fi
  die "uv is not installed and $python could not fetch it (no pip, or no registry reached)" \
    "remedy: install uv, or pip (Debian, Ubuntu: apt-get install python3-pip), and run this again"
}

make_venv() {
  say "making .venv"
  "$uv" venv --quiet --clear --python "${UV_PYTHON:->=$oldest}" "$venv" ||
    die "no Python $oldest or newer was found, and uv could not download one" \
      "remedy: install one, or name it: UV_PYTHON=/path/to/python3.12 bash launch/env.sh"
}

# Without a GPU PyTorch's CPU build saves several GB. It has an index of its own, which may be out of reach.
choose_torch() {
  if [ -n "${UV_TORCH_BACKEND:-}" ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then
    return
  fi
  if UV_HTTP_RETRIES=0 "$uv" pip install --quiet --python "$venv" --dry-run --no-deps --torch-backend cpu \
    --reinstall-package torch --constraints constraints.txt torch 2>/dev/null; then
    export UV_TORCH_BACKEND=cpu
    say "no GPU here: taking PyTorch's CPU build"
  else
    say "no GPU here, but PyTorch's own index is out of reach: taking the registry's GPU build (larger, runs on CPUs)"
  fi
}

# uv's progress bars need the terminal itself; elsewhere its list of a hundred packages would bury our lines.
install() {
  local command=("$uv" pip install --python "$venv" --constraints constraints.txt --editable "$1")
  if [ -t 2 ]; then "${command[@]}"; else "${command[@]}" 2>&1 | { grep -v '^ [-+~] ' || true; }; fi
}

# It imports what a launch does, and so leaves its bytecode beside the sources, also where the environment forbids that
# (container images often do): every process of every launch would compile 1,700 modules anew.
report() {
  say "compiling what a launch imports (seconds)"
  env -u PYTHONDONTWRITEBYTECODE DS_ACCELERATOR=cpu "$venv/bin/python" - <<'PYTHON'
import platform, torch, torch.distributed.run, torch.utils.tensorboard
import deepspeed.launcher.launch, deepspeed.launcher.runner, open_clip
import glide_ds, glide_ds.cli, glide_ds.training.run
gpus = torch.cuda.device_count()
device = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "CPU"
print(f"env: ready: glide_ds {glide_ds.__version__}, Python {platform.python_version()}, torch {torch.__version__}, {device}")
PYTHON
}

wanted=()
while [ $# -gt 0 ]; do
  case $1 in
    --extras)
      [ -n "${2:-}" ] || die "--extras needs names, such as: --extras test"
      IFS=, read -ra named <<<"$2"
      wanted+=("${named[@]}")
      shift 2
      ;;
    *) die "unknown argument '$1': use 'bash launch/env.sh [--extras test]'" ;;
  esac
done

# The place counts too: a venv that was moved or copied with its checkout does not work.
now=$({ echo "$root" && cat pyproject.toml constraints.txt launch/env.sh; } | sha256sum | cut -d' ' -f1)
works() { "$venv/bin/python" -I -S -c 'import sys' 2>/dev/null; }
# Extras once installed stay: `env.sh` after `env.sh --extras test` has nothing to do.
is_current() {
  local was='' had='' extra missing=0
  if [ -f "$stamp" ]; then { read -r was && read -r had; } <"$stamp" || true; fi
  read -ra extras <<<"$had"
  for extra in "${wanted[@]}"; do
    [[ " $had " == *" $extra "* ]] || { missing=1 && extras+=("$extra"); }
  done
  [ "$was" = "$now" ] && [ $missing = 0 ] && works
}
if is_current; then exit 0; fi

# Two runs at once, from two terminals or nodes, must not install over each other.
if command -v flock >/dev/null; then
  exec 9>"$root/.venv.lock"
  flock -n 9 || { say "another run is installing: waiting for it" && flock 9; }
  if is_current; then exit 0; fi
fi
find_uv || { bootstrap_uv && find_uv; } || die "uv was installed but does not run: remove .uv and run this again"
works || make_venv
choose_torch
list=$(IFS=,; echo "${extras[*]}")
say "installing glide_ds${list:+[$list]} (PyTorch and DeepSpeed: minutes the first time)"
started=$SECONDS
rm -f "$stamp"
install ".${list:+[$list]}" ||
  die "the installation failed: see uv's message above" \
    "remedy: mend what it names (network, disk space, a version in constraints.txt) and run this again"
say "installed in $((SECONDS - started)) s"
report
printf '%s\n%s\n' "$now" "${extras[*]:-}" >"$stamp"
