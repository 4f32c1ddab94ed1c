#!/usr/bin/env bash
# Prepare the virtual environment .venv in the checkout: bash tools/setup_env.sh {core|test}
# Versions come from requirements/lock.txt; a finished install is remembered and not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

lane=${1:-core}
case "$lane" in
  core) lists=(core) ;;
  test) lists=(core test) ;;
  *) echo "setup_env.sh: unknown lane '$lane'; expected core or test" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
"$python" - <<'CHECK' || exit 2
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"dinov3_mm needs Python 3.10 to 3.12, this is {sys.version.split()[0]}; "
             "set PYTHON to another interpreter, for example PYTHON=python3.11")
CHECK

files=(requirements/lock.txt pyproject.toml)
for list in "${lists[@]}"; do files+=("requirements/$list.txt"); done
stamp=".venv/.dinov3_mm_${lane}"
wanted=$(cat "${files[@]}" | cksum)
if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then exit 0; fi

if [[ ! -x .venv/bin/python ]]; then
  echo "Creating the virtual environment .venv"
  "$python" -m venv .venv
fi
arguments=()
for list in "${lists[@]}"; do arguments+=(-r "requirements/$list.txt"); done
echo "Installing the pinned packages (${lists[*]}); this takes a minute or two"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  -c requirements/lock.txt "${arguments[@]}"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
echo "$wanted" > "$stamp"
