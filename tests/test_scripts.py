"""
train.sh and test.sh: they install once, work from any folder, and forward their arguments.

    ./test.sh tests/test_scripts.py     # no network: pip's index is a closed port

A clean clone tests the real installation.
"""
import os
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_NETWORK = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_FIND_LINKS": "",
              "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}


@pytest.fixture
def clone(tmp_path):
    """A folder with the scripts, and a .venv (this interpreter's) that has requirements.txt installed already."""
    for name in ("train.sh", "test.sh", "setup_venv.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    (tmp_path / "train_gpt2.py").write_text("import sys, os\nprint('trains', sys.argv[1:], os.getcwd())\n")
    os.makedirs(tmp_path / ".venv" / "bin")
    for name in ("python", "torchrun"):
        (tmp_path / ".venv" / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        os.chmod(tmp_path / ".venv" / "bin" / name, 0o755)
    text = (tmp_path / "requirements.txt").read_text() * 2
    (tmp_path / ".venv" / "installed-requirements.txt").write_text(text)
    return tmp_path


def run(clone, *arguments, **env):
    return subprocess.run([str(clone / "train.sh"), *arguments], cwd="/", capture_output=True, text=True, timeout=60,
                          env={**NO_NETWORK, **env})


def test_a_second_call_needs_no_network_and_forwards_its_arguments(clone):
    process = run(clone, "--lr", "0.1", "--prompt", "two words")
    assert process.returncode == 0, process.stderr
    assert f"trains ['--lr', '0.1', '--prompt', 'two words'] {clone}" in process.stdout
    assert "installing" not in process.stdout


def test_changed_requirements_are_installed_again(clone):
    with open(clone / "requirements.txt", "a") as f:
        f.write("a-package-that-is-nowhere==1.0\n")
    process = run(clone)
    assert "installing requirements.txt" in process.stdout
    assert process.returncode != 0 and "trains" not in process.stdout
    assert run(clone).returncode != 0  # a failed installation is repeated


def test_a_python_that_is_too_old_or_missing_is_one_line(clone):
    shutil.rmtree(clone / ".venv")
    process = run(clone, PYTHON="no-such-python")
    assert process.returncode == 2 and "error: no-such-python is missing or older than Python 3.11" in process.stderr
    assert not os.path.exists(clone / ".venv")
