# Sourced by train.sh and test.sh: `source setup_venv.sh REQUIREMENTS` sets $python to the interpreter.
#
# That is .venv's, beside this file. .venv is created if it does not exist, by $PYTHON or python3. The
# requirements are installed, in the versions of constraints.txt, if one of these files has changed;
# otherwise the network is not used. Delete .venv to start over.
# ENV=active: the active environment's python3, or $PYTHON; nothing is created or installed.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$root/.venv"
python="$venv/bin/python"
base="${PYTHON:-python3}"

if [ "${ENV:-}" = active ]; then
  python="$base"
  if ! "$python" -c "import torch" 2>/dev/null; then
    echo "error: $python cannot import torch: $python -m pip install -r $root/$1" >&2
    exit 2
  fi
else
  if [ ! -e "$venv" ]; then
    if ! "$base" -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
      echo "error: Python 3.11 or newer is required; choose another: PYTHON=python3.12 $0" >&2
      exit 2
    fi
    echo "setup: creating $venv"
    if ! "$base" -m venv "$venv"; then
      rm -rf "$venv"  # a part of it may exist
      exit 2
    fi
  fi
  wanted="$(cd "$root" && cat requirements.txt "$1" constraints.txt)"
  stamp="$venv/installed-$1"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing $1 into .venv (the first time a download of up to 3 GB, with CUDA)"
    if ! (cd "$root" && "$python" -m pip install --disable-pip-version-check -r "$1" -c constraints.txt); then
      echo "error: the installation failed; try again, or delete $venv to start over" >&2
      exit 2
    fi
    printf '%s\n' "$wanted" > "$stamp"
  fi
fi
