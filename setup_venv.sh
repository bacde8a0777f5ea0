# Sourced by train.sh and test.sh: `source setup_venv.sh REQUIREMENTS` sets $python to the interpreter to run.
#
# That is .venv beside this file, created if it does not exist or cannot be used. The requirements are installed into it, in
# the versions of constraints.txt, if one of the files has changed; otherwise the network is not used. PYTHON selects the
# interpreter for it.
# ENV=active: the active environment's python3, or $PYTHON; nothing is created or installed, a missing package is an error.
venv_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$venv_root/.venv"
python="$venv/bin/python"
# prints .venv's version of Python: nothing if it does not run, or is another one than .venv was created with, without packages
venv_version() {
  "$venv/bin/python" -c 'import os, sys, sysconfig
if os.path.isdir(sysconfig.get_path("purelib")): print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null || true
}
venv_version="$(venv_version)"
# python -m venv writes activate last, after pip: without it, it was interrupted, or Debian's python3-venv was missing
if [ -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv/bin/activate" ]; then venv_version=""; fi
if [ "${ENV:-}" = active ] || [ -z "$venv_version" ]; then
  python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is missing or older than Python 3.11; choose another: PYTHON=python3.12 $0" >&2
    exit 2
  fi
fi
if [ "${ENV:-}" = active ]; then
  "$python" - "$venv_root" requirements.txt "$1" <<'CHECK' || exit 2
import os, re, sys
from importlib.metadata import PackageNotFoundError, version
root, *files = sys.argv[1:]
lines = [line for name in dict.fromkeys(files) for line in open(os.path.join(root, name))]
missing = []
for name, bounds in re.findall(r"^(\w[\w-]*)(\S*)", "".join(lines), re.M):
    try:
        installed = version(name)
    except PackageNotFoundError:
        missing.append(name + bounds)
        continue
    from packaging.specifiers import SpecifierSet  # matplotlib requires it
    if not SpecifierSet(bounds).contains(installed, prereleases=True):
        print(f"setup: {name} {installed} is installed, tested are {bounds}", file=sys.stderr)
if missing:
    sys.exit(f"error: the environment {sys.prefix} lacks {' '.join(missing)}; install them, or run without ENV=active")
CHECK
else
  if [ -z "$venv_version" ]; then
    echo "setup: creating $venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
      echo "error: $venv was not created with $python (on Debian and Ubuntu: apt install python3-venv)" >&2
      exit 2
    fi
    venv_version="$(venv_version)"
    python="$venv/bin/python"
  fi
  venv_wanted="$(cd "$venv_root" && cat requirements.txt "$1" constraints.txt && echo "$venv_version")"
  venv_stamp="$venv/installed-$1"
  if [ "$(cat "$venv_stamp" 2>/dev/null)" != "$venv_wanted" ]; then
    echo "setup: installing $1 into .venv (only when it has changed)"
    # other tools create environments without pip
    if ! "$python" -m pip --version >/dev/null 2>&1 && ! "$python" -m ensurepip >/dev/null 2>&1; then
      echo "error: $venv has no pip; install it there, or delete the folder" >&2
      exit 2
    fi
    (cd "$venv_root" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" -c constraints.txt)
    printf '%s\n' "$venv_wanted" > "$venv_stamp"
  fi
fi
