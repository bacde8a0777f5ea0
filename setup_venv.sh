# Sourced by train.sh and test.sh: `source setup_venv.sh REQUIREMENTS` creates .venv beside this file if it does not exist,
# and installs the requirements if they have changed; otherwise it does not use the network.
venv_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ ! -x "$venv_root/.venv/bin/python" ]; then
  python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is missing or older than Python 3.11; choose another: PYTHON=python3.12 $0" >&2
    exit 2
  fi
  echo "setup: creating $venv_root/.venv with $("$python" --version)"
  "$python" -m venv "$venv_root/.venv"
fi
venv_wanted="$(cd "$venv_root" && cat requirements.txt "$1")"
venv_stamp="$venv_root/.venv/installed-$1"
if [ "$(cat "$venv_stamp" 2>/dev/null)" != "$venv_wanted" ]; then
  echo "setup: installing $1 into .venv (only when it has changed)"
  (cd "$venv_root" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1")
  printf '%s\n' "$venv_wanted" > "$venv_stamp"
fi
