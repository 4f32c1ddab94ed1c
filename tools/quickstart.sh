#!/usr/bin/env bash
# The main job on a bare machine: install, pretrain in two stages, evaluate, draw, export.
#   bash tools/quickstart.sh            on SyntheticScenes, which come along
#   bash tools/quickstart.sh DIR        on the images below DIR
# Options after the folder go to tools/quickstart.py (see --help there).
set -euo pipefail
cd "$(dirname "$0")/.."
here=$OLDPWD
bash tools/setup_env.sh core
if [[ $# -gt 0 && $1 != -* ]]; then
  folder=$1
  shift
  [[ $folder == /* ]] || folder="$here/$folder"
  set -- --images "$folder" "$@"
fi
exec .venv/bin/python tools/quickstart.py "$@"
