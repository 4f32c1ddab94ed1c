#!/usr/bin/env bash
# Prepare the virtual environment .venv in the checkout: bash tools/setup_env.sh {core|test|ops}
#   core  the package and the quickstart      test  core and what the tests need
#   ops   test and mmpretrain, mmseg, mmdet, with mmcv's operators compiled
# Versions come from requirements/lock.txt; a finished install is remembered and not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

lane=${1:-core}
case "$lane" in
  core) lists=(core) ;;
  test) lists=(core test) ;;
  ops) lists=(core test ops) ;;
  *) echo "setup_env.sh: unknown lane '$lane'; expected core, test or ops" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
"$python" - <<'CHECK' || exit 2
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"dinov3_mm needs Python 3.11 to 3.13, this is {sys.version.split()[0]}; "
             "set PYTHON to another interpreter, for example PYTHON=python3.11")
CHECK

files=(requirements/lock.txt pyproject.toml)
for list in "${lists[@]}"; do files+=("requirements/$list.txt"); done
stamp=".venv/.dinov3_mm_${lane}"
wanted=$(cat "${files[@]}" | cksum)
if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then exit 0; fi

install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    -c requirements/lock.txt "$@"
}

has_operators() { .venv/bin/python -c "import torch, mmcv._ext" 2>/dev/null; }

# Outside of an isolated build environment, because mmcv's build leaves the operators out without torch.
compile_mmcv() {
  if has_operators; then return; fi
  local headers
  headers=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('include'))")
  if ! command -v "${CXX:-c++}" > /dev/null || [[ ! -f $headers/Python.h ]]; then
    echo "setup_env.sh: mmcv's operators need a C++ compiler and $headers/Python.h (Debian: apt-get" \
      "install g++ python3-dev); 'bash tools/run_tests.sh --core' does without them" >&2
    exit 2
  fi
  # On a machine with a GPU, but without nvcc, the build would fail: make it see no GPU.
  if ! command -v nvcc > /dev/null && [[ -z ${CUDA_HOME:-} ]]; then
    export CUDA_VISIBLE_DEVICES=
    echo "No nvcc found: mmcv's operators will run on the CPU only"
  fi
  MAX_JOBS=${MAX_JOBS:-$(nproc 2>/dev/null || echo 2)}
  export MAX_JOBS
  echo "Compiling mmcv's operators takes about 12 minutes on 2 cores, this once: pip keeps the result"
  install --no-build-isolation onedl-mmcv
  if has_operators; then return; fi
  echo "This mmcv was built without operators, or for another torch: compiling it anew"
  # Else pip would take the same wheel from its cache; there is nothing to remove where it has none.
  if .venv/bin/python -m pip cache dir > /dev/null 2>&1; then
    .venv/bin/python -m pip cache remove --quiet onedl_mmcv
  fi
  install --no-build-isolation --force-reinstall onedl-mmcv
  .venv/bin/python -c "import torch, mmcv._ext"
}

if [[ $lane == ops ]]; then
  bash tools/setup_env.sh test
  echo "Installing mmpretrain, mmseg and mmdet"
  install -r requirements/ops.txt
  compile_mmcv
  echo "$wanted" > "$stamp"
  exit 0
fi

if [[ ! -x .venv/bin/python ]]; then
  echo "Creating the virtual environment .venv"
  "$python" -m venv .venv
fi
arguments=()
for list in "${lists[@]}"; do arguments+=(-r "requirements/$list.txt"); done
echo "Installing the pinned packages (${lists[*]}); this takes a minute or two"
install "${arguments[@]}"
install -e .
echo "$wanted" > "$stamp"
