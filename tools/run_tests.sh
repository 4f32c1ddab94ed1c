#!/usr/bin/env bash
# The whole test suite on a bare machine: install, lint, test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup_env.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# One test process a core, one thread each: small models gain nothing from threads.
processes=$(nproc 2>/dev/null || echo 2) # before OMP_NUM_THREADS, which nproc obeys
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$processes" --dist loadfile "$@"
