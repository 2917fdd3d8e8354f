#!/usr/bin/env bash
# Run the tests, offline, in the project's own environment.
#
#   bash launch/test.sh            the fast suite, under a minute on two cores
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
status=0

# Fast tests share the cores, one thread each; a file stays on one process, with its fixtures.
if [ $suite = fast ] || [ $suite = all ]; then
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest -m "not slow and not cluster" \
    -n "$((cores < 4 ? cores : 4))" --dist loadfile "$@" || status=$?
fi
# Slow ones need the memory and the cores for themselves.
if [ $suite = slow ] || [ $suite = all ]; then
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores} .venv/bin/python -m pytest -m slow -n 0 --durations=10 "$@" || status=$?
fi
if [ $suite = cluster ]; then
  .venv/bin/python -m pytest -m cluster -n 0 -s "$@" || status=$?
fi
exit "$status"
