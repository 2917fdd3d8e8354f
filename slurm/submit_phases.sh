#!/usr/bin/env bash
# Submit one job per phase, each starting when the one before it is done; a phase that fails cancels the rest.
#
#   bash slurm/submit_phases.sh [--dry-run] [sbatch's options] -- --ds_config A.json B.json C.json [train.py's arguments]
#
# --dry-run prints the sbatch commands and submits nothing. Prints one job number per phase.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/lib.sh
. slurm/lib.sh

usage() { die 2 "$1" "use: bash slurm/submit_phases.sh [--dry-run] [sbatch's options] -- --ds_config JSON… [train.py's arguments]"; }

dry_run='' options=() phases=() shared=()
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1") && shift
done
[ $# -gt 1 ] || usage "nothing to train: the arguments of launch/train.py come after a --"
shift
all=("$@")
while [ $# -gt 0 ]; do
  if [ "$1" = --ds_config ]; then
    shift
    while [ $# -gt 0 ] && [[ $1 != --* ]]; do phases+=("$1") && shift; done
  else
    shared+=("$1") && shift
  fi
done
[ ${#phases[@]} -gt 0 ] || usage "no phase is named: --ds_config is missing"
run_dir=$(python slurm/run_directory.py "${all[@]}") || exit $? # a mistake in phase 3 is found before phase 1 waits

previous=''
for phase in "${phases[@]}"; do
  command=(sbatch --parsable --job-name="glide-$(basename "$phase" .json)")
  [ -z "$previous" ] || command+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
  command+=("${options[@]}" slurm/train.sbatch --ds_config "$phase" "${shared[@]}")
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}" && echo
    previous="<$(basename "$phase" .json)>"
  else
    previous=$("${command[@]}")
    previous=${previous%%;*} # ID;CLUSTER where there are several clusters
    echo "$previous $phase"
  fi
done
say "${#phases[@]} jobs for $run_dir"
