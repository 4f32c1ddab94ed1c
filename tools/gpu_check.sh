#!/usr/bin/env bash
# Everything that needs a GPU, in one command of eight minutes: bash tools/gpu_check.sh [--plan] [--only ITEM ...]
#
# Needs a Python with torch: PYTHON if it is set, else .venv of the checkout, else python3. What else is missing is
# installed into work_dirs/gpu_check/packages where pip can; --help lists the options of tools/gpu_check.py.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "gpu_check.sh: dinov3_mm needs Python 3.11 or newer; set PYTHON to one that has torch" >&2
  exit 2
fi
exec "$python" "$root/tools/gpu_check.py" "$@"
