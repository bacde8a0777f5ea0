#!/usr/bin/env bash
# Creates .venv, installs requirements-dev.txt, checks the style, and runs pytest.
#
#   ./test.sh                   the fast tests
#   ./test.sh --all             all tests
#   ./test.sh tests/test_data.py -k permute     other arguments go to pytest; -n 0: in one process, for --pdb
#   ENV=active ./test.sh        in the active environment; nothing is installed
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh, which is dash on Debian
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup_venv.sh" requirements-dev.txt
cd "$here"
marks=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then marks=(); else arguments+=("$argument"); fi
done
"$python" -m ruff check --quiet .
echo "test.sh: pytest ${marks[*]-} ${arguments[*]-}"
# the files of tests are distributed over the cores, in the order of tests/conftest.py instead of
# those with most tests first; a file's tests share its fixtures
exec "$python" -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
  ${marks[@]+"${marks[@]}"} ${arguments[@]+"${arguments[@]}"}
