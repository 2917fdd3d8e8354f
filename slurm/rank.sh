#!/usr/bin/env bash
# One rank of a Slurm job, under any launcher: bash slurm/rank.sh FOLDER. The arguments of launch/train.py are in
# FOLDER/arguments, so no launcher's shell expands them; output goes to the job's log and to FOLDER/rank-N.log, the
# exit code to FOLDER/rank-N.code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1
rank=${RANK:-$SLURM_PROCID}
export PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
mapfile -d '' -t arguments <"$folder/arguments"

# Slurm's signals come to every process of the job: those that only pass things on must outlive the training.
exec > >(trap '' TERM INT USR1 && exec tee -a "$folder/rank-$rank.log") 2>&1
tee=$!
trap : TERM INT USR1
code=0
python launch/train.py "${arguments[@]}" || code=$?
echo "$code" >"$folder/rank-$rank.code"
exec >&- 2>&-
wait "$tee" || true
exit "$code"
