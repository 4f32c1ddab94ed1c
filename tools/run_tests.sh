#!/usr/bin/env bash
# The whole test suite on a bare machine: install, lint, test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup_env.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# One test process a core, one thread each: small models gain nothing from threads.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$(nproc 2>/dev/null || echo 2)" --dist loadfile "$@"
