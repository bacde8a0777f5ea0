# Sourced by train.sh and test.sh: `source setup_venv.sh REQUIREMENTS` makes .venv beside this file if there is none, and
# installs the requirements when they changed since the last time; otherwise it does not touch the network.
venv_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ ! -x "$venv_root/.venv/bin/python" ]; then
  python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is missing or older than Python 3.11; name another one: PYTHON=python3.12 $0" >&2
    exit 2
  fi
  echo "setup: making $venv_root/.venv with $("$python" --version)"
  "$python" -m venv "$venv_root/.venv"
fi
venv_wanted="$(cd "$venv_root" && cat requirements.txt "$1")"
venv_stamp="$venv_root/.venv/installed-$1"
if [ "$(cat "$venv_stamp" 2>/dev/null)" != "$venv_wanted" ]; then
  echo "setup: installing $1 into .venv (once, and again when it changes)"
  (cd "$venv_root" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1")
  printf '%s\n' "$venv_wanted" > "$venv_stamp"
fi
