#!/usr/bin/env bash
# The whole test suite on a bare machine: install, lint, test. Arguments go to pytest.
# With --core first, or DINOV3_MM_LANE=core, nothing is compiled, and the tests that need mmpretrain, mmseg or mmdet
# are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
lane=${DINOV3_MM_LANE:-ops}
if [[ ${1:-} == --core ]]; then lane=core; shift; fi
case "$lane" in
  core | ops) export DINOV3_MM_LANE=$lane ;;
  *) echo "run_tests.sh: DINOV3_MM_LANE is '$lane'; expected core or ops" >&2; exit 2 ;;
esac
bash tools/setup_env.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
if [[ $lane == ops ]]; then bash tools/setup_env.sh ops; fi
# One test process a core, one thread each: small models gain nothing from threads.
processes=$(nproc 2>/dev/null || echo 2) # before OMP_NUM_THREADS, which nproc obeys
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$processes" --dist loadfile "$@"
