"""
train.sh, test.sh and train.sbatch: they install once, work from any folder, and forward their
arguments; the lists of packages; Windows, which has no shell for them.

    ./test.sh tests/test_scripts.py     # no network: pip's index is a closed port

A clean clone tests the real installation.
"""
import glob
import os
import re
import shutil
import subprocess
import sys

import pytest

from common import ROOT, TINY, python, text_of_words
from test_imports import imports_of

NO_NETWORK = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0",
              "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}


def write_program(path, code=f'exec "{sys.executable}" "$@"'):
    """An executable shell script at path that runs code, by default this interpreter."""
    path.write_text(f"#!/bin/sh\n{code}\n")
    os.chmod(path, 0o755)
    return str(path)


def write_torch(folder, gpus=0, cuda="None", hip="None"):
    """A stand-in for PyTorch, and its torchrun; PyTorch takes a second to import."""
    distributed = folder / "torch" / "distributed"
    os.makedirs(distributed, exist_ok=True)
    (distributed.parent / "__init__.py").write_text(
        f"class version: cuda, hip = {cuda}, {hip}\n"
        f"class cuda: device_count = staticmethod(lambda: {gpus})\n")
    (distributed / "__init__.py").touch()
    (distributed / "run.py").write_text(
        "import os, sys\n"
        "print('torchrun', sys.argv[1:], os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])\n")


@pytest.fixture
def clone(tmp_path):
    """A folder with the scripts, and a .venv (of this interpreter) with its packages installed."""
    clone = tmp_path / "clone"
    os.makedirs(clone / ".venv" / "bin")
    for name in ("train.sh", "test.sh", "setup_venv.sh", "train.sbatch", "requirements.txt",
                 "requirements-dev.txt", "constraints.txt"):
        shutil.copy(os.path.join(ROOT, name), clone)
    (clone / "train_gpt2.py").write_text(
        "import sys, os\nprint('trains', sys.argv[1:], os.getcwd())\n")
    write_program(clone / ".venv" / "bin" / "python")
    text = (clone / "requirements.txt").read_text() * 2 + (clone / "constraints.txt").read_text()
    (clone / ".venv" / "installed-requirements.txt").write_text(text)
    write_torch(clone / "stubs")
    return clone


def run(clone, *arguments, cwd="/", shell=(), **env):
    """The CompletedProcess of train.sh."""
    return subprocess.run([*shell, str(clone / "train.sh"), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=60,
                          env={**NO_NETWORK, "PYTHONPATH": str(clone / "stubs"), **env})


# -----------------------------------------------------------------------------
# the environment

@pytest.mark.parametrize("shell", [[], ["sh"], ["bash"]])
def test_a_second_call_needs_no_network_and_forwards_its_arguments(clone, tmp_path, shell):
    """It runs in the current directory, where --data my_book.txt is the user's file."""
    process = run(clone, "--lr", "0.1", "--prompt", "two  words", cwd=tmp_path, shell=shell)
    assert process.returncode == 0, process.stderr
    assert f"trains ['--lr', '0.1', '--prompt', 'two  words'] {tmp_path}\n" in process.stdout
    assert "setup:" not in process.stdout


@pytest.mark.parametrize("changed", ["requirements.txt", "constraints.txt"])
def test_changed_requirements_are_installed_again(clone, changed):
    """The version does not exist: the installation fails, and is repeated by the next call.

    The lists have nothing else: another torch than constraints.txt's would fail first.
    """
    (clone / "requirements.txt").write_text("tiktoken\n")
    (clone / "constraints.txt").write_text("")
    (clone / changed).write_text("tiktoken==0.0.99\n")
    for _ in range(2 if changed == "requirements.txt" else 1):
        process = run(clone)
        assert process.returncode == 2 and "trains" not in process.stdout
        assert "installing requirements.txt" in process.stdout and "tiktoken" in process.stderr
        last = process.stderr.splitlines()[-1]
        assert last.startswith("error: the installation failed; try again")


@pytest.mark.slow  # creates an environment
def test_an_environment_is_created_and_used(clone):
    for name in ("requirements.txt", "constraints.txt"):
        (clone / name).write_text("")
    shutil.rmtree(clone / ".venv")
    (clone / "train_gpt2.py").write_text("import sys\nprint(sys.prefix)")
    process = run(clone)
    assert "creating" in process.stdout and process.stdout.endswith(f"{clone / '.venv'}\n"), process
    process = run(clone)
    assert process.stdout.endswith(f"{clone / '.venv'}\n"), process
    assert "setup:" not in process.stdout


def test_an_environment_that_could_not_be_created_is_removed(clone, tmp_path):
    """Without Debian's python3-venv a part of it is left: the next call has to start over."""
    shutil.rmtree(clone / ".venv")
    code = 'case "$2" in venv) mkdir "$3"; echo "apt install python3-venv"; exit 1;; esac'
    process = run(clone, PYTHON=write_program(tmp_path / "python", code))
    assert process.returncode == 2 and "apt install python3-venv" in process.stdout
    assert not (clone / ".venv").exists()


def test_a_python_that_is_missing_is_an_error(clone):
    shutil.rmtree(clone / ".venv")
    process = run(clone, PYTHON="no-such-python")
    assert process.returncode == 2
    assert "error: Python 3.11 or newer is required; choose another" in process.stderr
    assert not (clone / ".venv").exists()


def test_the_active_environment_is_used_without_an_installation(clone, tmp_path):
    shutil.rmtree(clone / ".venv")
    os.mkdir(tmp_path / "active")
    write_program(tmp_path / "active" / "python3")
    path = f"{tmp_path / 'active'}:{os.environ['PATH']}"
    process = run(clone, "--x", ENV="active", PATH=path)
    assert process.returncode == 0, process.stderr
    assert "trains ['--x'] /\n" in process.stdout and "setup" not in process.stdout
    assert not (clone / ".venv").exists()
    without_packages = f'exec "{sys.executable}" -S -E "$@"'
    write_program(tmp_path / "active" / "python3", without_packages)
    process = run(clone, ENV="active", PATH=path)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == ("error: python3 cannot import torch: python3 -m pip install"
                              f" -r {clone}/requirements.txt\n")


# -----------------------------------------------------------------------------
# devices

@pytest.mark.parametrize("program, code, message, build", [
    ("nvidia-smi", "echo 'GPU 0: NVIDIA H100 80GB HBM3'",
     "has an NVIDIA GPU, but PyTorch was built without CUDA", {"cuda": "'13.0'"}),
    ("rocm-smi", "", "the pip command for ROCm of pytorch.org/get-started", {"hip": "'7.0'"})])
def test_a_build_of_pytorch_that_cannot_use_the_machines_gpu_is_one_line(
        program, code, message, build, clone, tmp_path):
    """It trained on the CPU without a word."""
    write_program(tmp_path / program, code)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = run(clone, PATH=path)
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert message in process.stderr
    assert run(clone, "--device", "cpu", PATH=path).returncode == 0  # it is the user's choice
    write_torch(clone / "stubs", gpus=1, **build)
    assert "training on one GPU\ntrains" in run(clone, PATH=path).stdout


def test_a_device_that_is_named_is_the_only_one(clone):
    """--device cpu on a machine of 8 GPUs started 8 processes on its CPU."""
    write_torch(clone / "stubs", gpus=8)
    for flags, device in ((["--device", "cpu"], "cpu"),
                          (["--lr", "1", "--device=cuda:3"], "cuda:3")):
        process = run(clone, *flags)
        assert f"training on one device, {device}\ntrains {flags}" in process.stdout, process.stderr
    for flags in ([], ["--device", "cuda"], ["--device=auto", "--prompt", "cuda:3"]):
        process = run(clone, *flags)
        torchrun = "training on 8 GPUs\ntorchrun ['--standalone', '--nproc_per_node=8',"
        assert torchrun in process.stdout, process.stderr


def test_torchrun_needs_no_host_name_has_time_to_save_and_ignores_sighup_under_nohup(clone):
    """It hung where the host's name does not resolve, and stopped when the terminal was closed."""
    write_torch(clone / "stubs", gpus=2)
    for shell, more in (([], ""), (["nohup"], ", '--signals-to-handle=SIGTERM,SIGINT,SIGQUIT'")):
        expected = ("torchrun ['--standalone', '--nproc_per_node=2', '--local_addr=127.0.0.1'"
                    f"{more}, '{clone}/train_gpt2.py', '--lr', '1'] 300\n")
        assert run(clone, "--lr", "1", shell=shell).stdout.endswith(expected)


def test_sruns_tasks_have_the_cpus_of_the_job(clone, tmp_path):
    """Since Slurm 22.05 srun does not inherit --cpus-per-task: all ranks of a node had one core."""
    os.mkdir(tmp_path / "slurm")
    write_program(tmp_path / "slurm" / "srun", 'for word; do echo "$word"; done')
    write_program(tmp_path / "slurm" / "scontrol", "echo node1")
    env = {**os.environ, "PATH": f"{tmp_path / 'slurm'}:{os.environ['PATH']}",
           "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    ports = []
    for cpus, first in (({"SLURM_CPUS_PER_TASK": "64"}, "--cpus-per-task=64"),
                        ({"SLURM_JOB_ID": "1019999"}, ".venv/bin/python")):
        process = subprocess.run(["bash", "train.sbatch", "--preset", "gpt2-124M"], cwd=clone,
                                 env=env | cpus, capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stderr
        assert process.stdout.startswith(f"{first}\n")
        assert process.stdout.endswith("train_gpt2.py\n--preset\ngpt2-124M\n")
        ports.append(re.search(r"--rdzv_endpoint=node1:(\d+)\n", process.stdout)[1])
    # two jobs on one node once shared port 29500
    assert ports == ["10007", "29999"]


# -----------------------------------------------------------------------------
# the lists of packages

# packages that are not imported under their own name
NAMES = {"PIL": "pillow", "backports": "backports.zstd"}
# --tracker wandb says that it must be installed; Python 3.14 has compression
OPTIONAL = {"wandb", "compression"}


def packages(name):
    """{package: bounds} of a requirements file."""
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return dict(re.findall(r"^(\w[\w.-]*)([^\s;]*)", f.read(), re.M))


def third_party(*patterns):
    """The packages that these files import, ours and the standard library's excepted."""
    names = set()
    for pattern in patterns:
        for path in glob.glob(os.path.join(ROOT, pattern)):
            names |= {name.split(".")[0] for name in imports_of(path)}
    modules = glob.glob(os.path.join(ROOT, "*.py"))
    ours = {os.path.basename(path).removesuffix(".py") for path in modules}
    return {NAMES.get(name, name)
            for name in names - ours - {"bench", "run"} - sys.stdlib_module_names}


def test_every_package_that_the_scripts_import_is_required():
    needed, required = third_party("*.py", "run/*.py"), packages("requirements.txt").keys()
    assert {"torch", "pyarrow"} <= needed  # third_party finds them
    assert needed - OPTIONAL - required == set()
    assert required - needed == {"ipykernel"}  # which the notebook needs
    # the benchmarks compare with what the tests need
    assert third_party("bench/*.py") - required - packages("requirements-dev.txt").keys() == set()


def test_every_requirement_has_bounds_and_a_tested_version_within_them():
    from packaging.specifiers import SpecifierSet
    required = packages("requirements.txt") | packages("requirements-dev.txt")
    exact = packages("constraints.txt")
    assert required.keys() == exact.keys()
    for name, bounds in required.items():
        assert re.fullmatch(r">=[\d.]+,<[\d.]+", bounds), name
        tested = exact[name].removeprefix("==")
        assert SpecifierSet(bounds).contains(tested), (name, tested)


# -----------------------------------------------------------------------------
# Windows

# hides what Python on Windows lacks, imports the benchmarks, trains 2 steps, and resumes
AS_ON_WINDOWS = """
import os, runpy, signal, sys
import matplotlib.figure, torch._dynamo  # use some of it themselves
for name in ("fcntl", "grp", "pwd", "readline", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2",
             "alarm", "pthread_sigmask"):
    delattr(signal, name)
for name in ("chown", "fork", "getuid", "geteuid", "killpg", "nice", "pread", "register_at_fork",
             "sched_getaffinity", "setsid", "sysconf", "uname"):
    delattr(os, name)
exists = os.path.exists
os.path.exists = lambda path: not str(path).startswith("/proc/") and exists(path)
import bench.__main__
sys.argv = [*sys.argv[1:], "--max-steps", "2"]
for sys.argv[-1] in ("2", "3"):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        assert e.code == 0
"""


def test_training_needs_nothing_that_windows_lacks(tmp_path):
    """The benchmarks imported resource, a module of POSIX."""
    (tmp_path / "text.txt").write_text(text_of_words())
    arguments = [*TINY, "--data", "text.txt", "--device", "cpu", "--exp-name", "a"]
    process = python("-c", AS_ON_WINDOWS, os.path.join(ROOT, "train_gpt2.py"), *arguments,
                     cwd=tmp_path, env={"PYTHONPATH": ROOT})
    assert process.returncode == 0, process.stderr
    assert "resuming log/a from step 2" in process.stdout
    assert "saved log/a/model_00003.pt" in process.stdout
