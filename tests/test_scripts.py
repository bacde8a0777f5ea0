"""
train.sh and test.sh: they install once, work from any folder, forward their arguments, and can use the active environment.

    ./test.sh tests/test_scripts.py     # no network: pip's index is a closed port

A clean clone tests the real installation.
"""
import ast
import glob
import os
import re
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_NETWORK = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_FIND_LINKS": "",
              "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}
VERSION = "Python {}.{}".format(*sys.version_info)
SCRIPTS = ("train.sh", "test.sh", "setup_venv.sh", "requirements.txt", "requirements-dev.txt", "constraints.txt")


def write_python(path, code=f'exec "{sys.executable}" "$@"'):
    """A shell script at path that runs code, this interpreter by default."""
    path.write_text(f"#!/bin/sh\n{code}\n")
    os.chmod(path, 0o755)
    return str(path)


@pytest.fixture
def clone(tmp_path):
    """A folder with the scripts, and a .venv (this interpreter's) that has requirements.txt installed already."""
    clone = tmp_path / "clone"
    os.makedirs(clone / ".venv" / "bin")
    for name in SCRIPTS:
        shutil.copy(os.path.join(ROOT, name), clone)
    (clone / "train_gpt2.py").write_text("import sys, os\nprint('trains', sys.argv[1:], os.getcwd())\n")
    write_python(clone / ".venv" / "bin" / "python")
    (clone / ".venv" / "bin" / "activate").touch()
    text = (clone / "requirements.txt").read_text() * 2 + (clone / "constraints.txt").read_text()
    (clone / ".venv" / "installed-requirements.txt").write_text(f"{text}{VERSION}\n")
    os.mkdir(clone / "stubs")  # in place of PyTorch, which takes a second to import
    (clone / "stubs" / "torch.py").write_text("class cuda: device_count = staticmethod(lambda: 0)\n")
    return clone


def run(clone, *arguments, cwd="/", **env):
    return subprocess.run([str(clone / "train.sh"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60,
                          env={**NO_NETWORK, "PYTHONPATH": str(clone / "stubs"), **env})


def test_a_second_call_needs_no_network_and_forwards_its_arguments(clone, tmp_path):
    """It runs in the caller's folder: there --data my_book.txt is the user's file, and log/ the user's."""
    process = run(clone, "--lr", "0.1", "--prompt", "two words", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert f"trains ['--lr', '0.1', '--prompt', 'two words'] {tmp_path}\n" in process.stdout
    assert "installing" not in process.stdout


@pytest.mark.parametrize("changed", ["requirements.txt", "constraints.txt"])
def test_changed_requirements_are_installed_again(clone, changed):
    """The version does not exist: the installation fails, and is repeated by the next call."""
    text = (clone / changed).read_text()
    (clone / changed).write_text(re.sub(r"^tiktoken\S*", "tiktoken==0.0.99", text, flags=re.M))
    for _ in range(2):
        process = run(clone)
        assert "installing requirements.txt" in process.stdout and "tiktoken" in process.stderr
        assert process.returncode != 0 and "trains" not in process.stdout


# a Python for which `-m venv` writes what the real one writes, in this order, and `-m pip` succeeds
BASE = f"""
case "$*" in
  "-m venv --clear "*)
    rm -rf "$4"; mkdir -p "$4/bin"; : > "$4/pyvenv.cfg"; cp "$0" "$4/bin/python"
    if [ -n "$INTERRUPTED" ]; then exit 1; fi
    : > "$4/bin/activate" ;;
  "-m pip --version") if [ -n "$NO_PIP" ]; then exit 1; fi ;;
  "-m ensurepip") if [ "$NO_PIP" = 2 ]; then exit 1; fi; echo ensurepip >> "$LOG" ;;
  "-m pip"*) echo pip >> "$LOG" ;;
  *) exec "{sys.executable}" "$@" ;;
esac"""


def vanished(venv):
    os.remove(venv / "bin" / "python")
    os.symlink("/nowhere/python3.11", venv / "bin" / "python")


def changed(venv):
    """.venv/bin/python is a link to the base Python, which is now another version than that of the packages in lib."""
    vanished(venv)
    os.remove(venv / "bin" / "python")
    os.symlink(os.path.realpath(sys.executable), venv / "bin" / "python")
    (venv / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\nversion = 3.10.1\n")
    os.makedirs(venv / "lib" / "python3.10" / "site-packages")


def interrupted(venv):
    os.remove(venv / "bin" / "activate")
    (venv / "pyvenv.cfg").touch()
    for stamp in venv.glob("installed-*"):
        os.remove(stamp)


@pytest.mark.parametrize("fault", [vanished, changed, interrupted])
def test_an_environment_that_cannot_be_used_is_created_again(clone, tmp_path, fault):
    """Every start failed until .venv was deleted. The new one is created until it succeeds, and then used."""
    fault(clone / ".venv")
    env = {"PYTHON": write_python(tmp_path / "base", BASE), "LOG": str(tmp_path / "log")}
    process = run(clone, **env, INTERRUPTED="1")
    assert process.returncode == 2 and "trains" not in process.stdout
    assert re.fullmatch(r"error: \S+/.venv was not created with \S+/base \(on Debian .* python3-venv\)\n", process.stderr)
    process = run(clone, **env)
    assert process.returncode == 0 and "creating" in process.stdout and "trains" in process.stdout, process.stderr
    process = run(clone, **env)
    assert "creating" not in process.stdout and "installing" not in process.stdout and "trains" in process.stdout
    assert (tmp_path / "log").read_text() == "pip\n"


def test_a_stamp_of_another_python_is_not_valid(clone, tmp_path):
    """Two versions of Python can share .venv, in lib/python3.11 and lib/python3.12."""
    write_python(clone / ".venv" / "bin" / "python", BASE)
    stamp = clone / ".venv" / "installed-requirements.txt"
    stamp.write_text(stamp.read_text().replace(VERSION, "Python 3.2"))
    process = run(clone, LOG=str(tmp_path / "log"))
    assert "installing" in process.stdout and "trains" in process.stdout and stamp.read_text().endswith(f"{VERSION}\n")


def test_an_environment_without_pip_gets_it(clone, tmp_path):
    """Those of uv have none; it is not ours to delete."""
    write_python(clone / ".venv" / "bin" / "python", BASE)
    os.remove(clone / ".venv" / "installed-requirements.txt")
    process = run(clone, NO_PIP="2", LOG=str(tmp_path / "log"))
    assert process.returncode == 2 and re.search(r"^error: \S+/.venv has no pip; install it there", process.stderr)
    process = run(clone, NO_PIP="1", LOG=str(tmp_path / "log"))
    assert process.returncode == 0 and (tmp_path / "log").read_text() == "ensurepip\npip\n"


@pytest.mark.slow
def test_a_real_environment_is_created_again_by_its_own_python(clone, tmp_path):
    """With .venv activated, python3 is the one that is replaced."""
    for name in ("requirements.txt", "constraints.txt"):
        (clone / name).write_text("")
    shutil.rmtree(clone / ".venv")
    (clone / "train_gpt2.py").write_text("import sys\nprint(sys.prefix)")
    env = {"PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"}
    assert run(clone, **env).stdout.endswith(f"{clone / '.venv'}\n")
    os.rename(next((clone / ".venv" / "lib").iterdir()), clone / ".venv" / "lib" / "python3.10")  # as after an upgrade
    process = run(clone, **env)
    assert "creating" in process.stdout and process.stdout.endswith(f"{clone / '.venv'}\n"), process
    assert not (clone / ".venv" / "lib" / "python3.10").exists()
    process = run(clone, **env)
    assert "setup:" not in process.stdout and process.stdout.endswith(f"{clone / '.venv'}\n")


@pytest.mark.parametrize("shell", ["", "sh", "dash", "bash"])
def test_train_sh_starts_under_any_shell_and_through_a_link(clone, shell):
    """dash has no pipefail, and setup_venv.sh is not beside a link."""
    if shell and not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    os.mkdir(clone / "link")
    os.symlink("../train.sh", clone / "link" / "train")
    for script in ("./train.sh", "link/train"):
        process = subprocess.run([*shell.split(), script, "--prompt", "two  words"], cwd=clone, capture_output=True, text=True,
                                 env={**NO_NETWORK, "PYTHONPATH": str(clone / "stubs")}, timeout=60)
        assert process.returncode == 0, process.stderr
        assert f"trains ['--prompt', 'two  words'] {clone}\n" in process.stdout


def test_sruns_tasks_have_the_cpus_of_the_job(clone, tmp_path):
    """Since Slurm 22.05 srun does not inherit --cpus-per-task: all ranks of a node had one core."""
    shutil.copy(os.path.join(ROOT, "train.sbatch"), clone)
    os.mkdir(tmp_path / "slurm")
    write_python(tmp_path / "slurm" / "srun", 'for word; do echo "$word"; done')
    write_python(tmp_path / "slurm" / "scontrol", "echo node1")
    env = {**os.environ, "PATH": f"{tmp_path / 'slurm'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node1",
           "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    for cpus, first in (({"SLURM_CPUS_PER_TASK": "64"}, "--cpus-per-task=64"), ({}, ".venv/bin/python")):
        process = subprocess.run(["bash", "train.sbatch", "--preset", "gpt2-124M"], cwd=clone, env=env | cpus,
                                 capture_output=True, text=True, timeout=60)
        assert process.returncode == 0 and process.stdout.startswith(f"{first}\n"), process.stderr
        assert process.stdout.endswith("train_gpt2.py\n--preset\ngpt2-124M\n")


def test_a_python_that_is_too_old_or_missing_is_one_line(clone):
    shutil.rmtree(clone / ".venv")
    for env in ({}, {"ENV": "active"}):
        process = run(clone, PYTHON="no-such-python", **env)
        assert process.returncode == 2 and process.stderr.count("\n") == 1
        assert "error: no-such-python is missing or older than Python 3.11" in process.stderr
        assert not os.path.exists(clone / ".venv")


def test_the_active_environment_is_used_without_an_installation(clone, tmp_path):
    shutil.rmtree(clone / ".venv")
    os.mkdir(tmp_path / "active")
    write_python(tmp_path / "active" / "python3")
    process = run(clone, "--x", ENV="active", PATH=f"{tmp_path / 'active'}:{os.environ['PATH']}")
    assert process.returncode == 0, process.stderr
    assert "trains ['--x'] /\n" in process.stdout and "setup" not in process.stdout + process.stderr
    assert not os.path.exists(clone / ".venv")


def test_packages_that_the_active_environment_lacks_are_one_line(clone, tmp_path):
    """An environment without any: -S is Python without site-packages."""
    active = write_python(tmp_path / "python3", f'exec "{sys.executable}" -S "$@"')
    process = run(clone, ENV="active", PYTHON=active)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and process.stdout == ""
    assert process.stderr.startswith("error: the environment ") and "lacks torch>=2.11,<2.14 numpy" in process.stderr


def test_versions_in_the_active_environment_that_were_not_tested_are_told(clone):
    text = (clone / "requirements.txt").read_text()
    (clone / "requirements.txt").write_text(text.replace("torch>=2.11,<2.14", "torch>=1.0,<2.0"))
    process = run(clone, ENV="active", PYTHON=sys.executable)
    assert process.returncode == 0 and "trains" in process.stdout
    assert re.fullmatch(r"setup: torch \S+ is installed, tested are >=1.0,<2.0\n", process.stderr)


# -----------------------------------------------------------------------------
# the lists of packages

NAMES = {"PIL": "pillow"}  # packages that are not imported under their own name
OPTIONAL = {"wandb"}       # --tracker wandb says that it must be installed


def packages(name):
    """{package: bounds} of a requirements file."""
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return dict(re.findall(r"^(\w[\w-]*)(\S*)", f.read(), re.M))


def third_party(pattern):
    """The packages that the files imported anywhere, ours and the standard library's excepted."""
    paths = glob.glob(os.path.join(ROOT, pattern))
    ours = {os.path.basename(path).removesuffix(".py") for path in paths + glob.glob(os.path.join(ROOT, "*.py"))}
    names = set()
    for path in paths:
        with open(path, encoding="utf-8") as f:
            for node in ast.walk(ast.parse(f.read())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    found = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                    names |= {name.split(".")[0] for name in found if name}
    return {NAMES.get(name, name) for name in names - ours - sys.stdlib_module_names - {"bench", "run"}}


def test_every_package_that_the_scripts_import_is_required():
    needed, required = third_party("*.py") | third_party("run/*.py"), packages("requirements.txt").keys()
    assert {"torch", "pyarrow", "pillow"} <= needed  # third_party finds them
    assert needed - OPTIONAL - required == set()
    assert required - needed == {"ipykernel"}  # which the notebook needs
    # the benchmarks compare with what the tests need
    assert third_party("bench/*.py") - required - packages("requirements-dev.txt").keys() == set()


def test_every_requirement_has_bounds_and_a_tested_version_within_them():
    from packaging.specifiers import SpecifierSet
    required, exact = packages("requirements.txt") | packages("requirements-dev.txt"), packages("constraints.txt")
    assert required.keys() == exact.keys()
    for name, bounds in required.items():
        assert re.fullmatch(r">=[\d.]+,<[\d.]+", bounds), name
        tested = exact[name].removeprefix("==")
        assert SpecifierSet(bounds).contains(tested), (name, tested)


def test_a_build_of_pytorch_without_cuda_on_a_machine_with_a_gpu_is_one_line(clone, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3'\n")
    os.chmod(tmp_path / "nvidia-smi", 0o755)
    (tmp_path / "torch.py").write_text("__version__ = '2.13.0+cpu'\nclass version: cuda = None\n"
                                       "class cuda: device_count = staticmethod(lambda: 0)\n")
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(tmp_path))
    process = run(clone, **env)
    assert process.returncode == 2 and "trains" not in process.stdout
    assert process.stderr.startswith("error: this machine has an NVIDIA GPU, but PyTorch 2.13.0+cpu has no CUDA")
    assert run(clone, "--device", "cpu", **env).returncode == 0  # it is the user's choice
    (tmp_path / "torch.py").write_text("__version__ = '2.13.0'\nclass version: cuda = '13.0'\n"
                                       "class cuda: device_count = staticmethod(lambda: 1)\n")
    assert run(clone, **env).returncode == 0


def test_a_device_that_is_named_is_the_only_one(clone):
    """--device cpu on a machine of 8 GPUs started 8 processes on its CPU, and --device cuda:3 used all GPUs."""
    (clone / "stubs" / "torch.py").unlink()
    distributed = clone / "stubs" / "torch" / "distributed"  # a stub of torchrun
    os.makedirs(distributed)
    (distributed.parent / "__init__.py").write_text("class cuda: device_count = staticmethod(lambda: 8)\n")
    (distributed / "__init__.py").touch()
    (distributed / "run.py").write_text("import sys\nprint('torchrun', sys.argv[1:])\n")
    for flags, device in ((["--device", "cpu"], "cpu"), (["--lr", "1", "--device=cuda:3"], "cuda:3")):
        process = run(clone, *flags)
        assert f"training on one device, {device}\ntrains {flags}" in process.stdout, process.stderr
    for flags in ([], ["--device", "cuda"], ["--device=auto", "--prompt", "cuda:3"]):
        process = run(clone, *flags)
        assert "training on 8 GPUs\ntorchrun ['--standalone', '--nproc_per_node=8'," in process.stdout, process.stderr
