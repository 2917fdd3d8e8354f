#!/usr/bin/env bash
# Run the tests, offline, in the project's own environment.
#
#   bash launch/test.sh            the fast suite, two to three minutes on two cores
#   bash launch/test.sh --slow     only the slow tests: full-size models, whole launches
#   bash launch/test.sh --all      both
#   bash launch/test.sh --cluster  jobs on a Slurm cluster that the tests start: root, and .ci/run's Debian packages
#
# Anything else goes to pytest: bash launch/test.sh tests/data -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suite=fast
case "${1:-}" in
  --slow) suite=slow && shift ;;
  --all) suite=all && shift ;;
  --cluster) suite=cluster && shift ;;
esac

bash launch/env.sh --extras test
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1
cores=$(nproc)
shared=(-n "$((cores < 4 ? cores : 4))" --dist loadfile) # a file stays on one process, with its fixtures
status=0
nothing=5 # pytest's code for no tests, until some are found: paths may leave a pass without any

run() {
  local code=0
  .venv/bin/python -m pytest "$@" || code=$?
  [ $code = 5 ] || nothing=0
  [ $code = 0 ] || [ $code = 5 ] || status=$code
}

if [ $suite = fast ] || [ $suite = all ]; then
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} run -m "not slow and not cluster" "${shared[@]}" "$@"
fi
if [ $suite = slow ] || [ $suite = all ]; then
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} run -m "slow and not alone" "${shared[@]}" --durations=10 "$@"
  # These need the memory and the cores for themselves.
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores} run -m "slow and alone" -n 0 --durations=10 "$@"
fi
if [ $suite = cluster ]; then
  run -m cluster -n 0 -s "$@"
fi
exit $((status ? status : nothing))
