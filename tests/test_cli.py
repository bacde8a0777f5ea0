"""
Flags, errors and exit statuses of a script, on one and on several ranks, Ctrl-C, printing, and
signals that stop a run.

    .venv/bin/python -m pytest tests/test_cli.py

Needs only requirements-dev.txt.
"""
import argparse
import contextlib
import importlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from common import ROOT, python
from run import cli
from run.cli import StopSignals, number, run_main

# the scripts, with arguments that they accept
SCRIPTS = {"train_gpt2.py": [], "fineweb.py": ["--verify", "shards"], "hellaswag.py": ["gpt2"],
           "sample.py": ["gpt2"], "convert.py": ["info", "gpt2"], "plots.py": ["gpt2"],
           "bench": ["loader"]}


def script_arguments(script, folder=ROOT):
    """Python's arguments that run a script of a folder, or the package bench."""
    file = ["-m", "bench"] if script == "bench" else [os.path.join(folder, script)]
    return [*file, *SCRIPTS[script]]


# -----------------------------------------------------------------------------
# --help

@pytest.mark.parametrize("script, at_least", [
    ("train_gpt2.py", 3), ("fineweb.py", 6), ("hellaswag.py", 4), ("sample.py", 4),
    ("convert.py", 3), ("plots.py", 7), ("bench", 7)])
def test_help_ends_with_commands_that_the_script_accepts(script, at_least, tmp_path, monkeypatch,
                                                         capsys):
    """Only train_gpt2.py's --help had examples."""
    name = "bench.__main__" if script == "bench" else script.removesuffix(".py")
    parse_args = importlib.import_module(name).parse_args
    monkeypatch.chdir(tmp_path)
    os.mkdir("hellaswag")
    (tmp_path / "hellaswag" / "hellaswag_val.jsonl").touch()
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        parse_args()
    examples = capsys.readouterr().out.partition("\nexamples:\n")[2]
    accepted = 0
    for line in examples.splitlines():
        words = shlex.split(line, comments=True)
        if script not in words:  # the rest of a comment
            continue
        monkeypatch.setattr(sys, "argv", words[words.index(script):])
        parse_args()
        accepted += 1
    assert accepted >= at_least


def test_compile_and_json_take_the_same_kind_of_value_in_every_script(monkeypatch, tmp_path):
    """Each was a switch in one script and took a value in another."""
    monkeypatch.chdir(tmp_path)
    cases = [("hellaswag", "gpt2 --compile on --json a.json"), ("sample", "gpt2 --compile on"),
             ("bench.__main__", "train --json a.json"), ("train_gpt2", "--compile on"),
             # without a value: on, and stdout
             ("hellaswag", "gpt2 --json --compile"), ("sample", "gpt2 --compile"),
             ("bench.__main__", "train --json")]
    for name, flags in cases:
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        args = importlib.import_module(name).parse_args()
        args = args if isinstance(args, dict) else vars(args)
        assert args.get("compile", "on") == "on"
        assert args.get("json", "-") == ("a.json" if "a.json" in flags else "-")


# -----------------------------------------------------------------------------
# how a script exits

def exit_of(main, capsys):
    """(exit status, stderr) of run_main(main)."""
    with pytest.raises(SystemExit) as e:
        run_main(main)
    return e.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status, printed", [
    (ValueError("T=5: must be 1"), 2, "error: T=5: must be 1\n"),
    (OSError(28, "No space left"), 2, "error: [Errno 28] No space left\n"),
    (MemoryError("of 2 GB"), 2, "error: out of memory: of 2 GB\n"),
    (ValueError("bad \x1b[31mred\nfield"), 2, "error: bad \\x1b[31mred field\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted\n")])
def test_an_expected_error_is_one_line_and_a_status(error, status, printed, capsys):
    assert exit_of(raising(error), capsys) == (status, printed)


THREADS_IN_CPP = """
import atexit, io, sys, threading, time
import pyarrow as pa, pyarrow.parquet as pq
from run.cli import run_main
pq.write_table(pa.table({"n": list(range(20000))}), "a.parquet", row_group_size=100)
def read():
    while True:
        pq.ParquetFile("a.parquet", pre_buffer=False).read(use_threads=False)
def main():
    for _ in range(8):
        threading.Thread(target=read, daemon=True).start()
    time.sleep(0.2)
    atexit.register(print, "atexit")
    if sys.argv[1] == "2":
        raise ValueError("no such thing")
    assert sys.argv[1] == "0", "a bug"
run_main(main)
"""


@pytest.mark.parametrize("status, printed", [(0, ""), (1, "AssertionError: a bug"),
                                             (2, "error: no such thing")])
def test_under_torchrun_a_script_exits_with_its_status_while_a_thread_runs(
        status, printed, tmp_path):
    process = python("-c", THREADS_IN_CPP, status, cwd=tmp_path,
                     env={"RANK": "0", "PYTHONPATH": ROOT})
    assert process.returncode == status and printed in process.stderr, process.stderr
    assert process.stdout == "atexit\n"


def test_a_bug_keeps_its_traceback_and_success_is_status_0():
    with pytest.raises(AssertionError, match="a bug"):
        run_main(raising(AssertionError("a bug")))
    assert run_main(lambda: None) is None


def test_an_invalid_flag_is_one_line(capsys):
    parser = cli.ArgumentParser(prog="x.py")
    parser.add_argument("--steps", type=int, choices=(1, 2))
    status, line = exit_of(lambda: parser.parse_args(["--steps", "3"]), capsys)
    assert status == 2 and line.startswith("error: --steps invalid choice: 3")
    assert line.count("\n") == 1


# -----------------------------------------------------------------------------
# errors of several ranks

def rank_raises(error, rank, tmp_path, monkeypatch, capsys):
    """(seconds that a rank waits before it prints an error, what it prints, torchrun's file)."""
    waits, path = [], tmp_path / "error.json"
    path.unlink(missing_ok=True)
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.atexit, "register", lambda *_: None)  # exit_now would end the tests
    for name, value in (("RANK", str(rank)), ("TORCHELASTIC_ERROR_FILE", str(path))):
        monkeypatch.setenv(name, value)
    with pytest.raises((SystemExit, type(error))):
        run_main(raising(error))
    monkeypatch.undo()
    text = None
    if path.exists():
        text = json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"]
    return waits, capsys.readouterr().err, text


def test_rank_0_prints_an_error_first_and_the_rank_that_lost_the_connection_last(
        tmp_path, monkeypatch, capsys):
    """torchrun ends the other ranks when one has ended; without the wait each rank printed."""
    arguments = tmp_path, monkeypatch, capsys
    expected = ([], "error: no data\n", "error: no data")
    assert rank_raises(ValueError("no data"), 0, *arguments) == expected
    waits, printed, _ = rank_raises(ValueError("no data"), 1, *arguments)
    assert 1 <= waits[0] <= 5 and printed == "error: no data\n"
    for lost in (RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
                 torch.distributed.DistNetworkError("The client socket has failed to connect")):
        later, printed, text = rank_raises(lost, 0, *arguments)
        assert later[0] > waits[0] and printed.startswith("error: rank 0 lost the connection")
        assert printed == text + "\n"
    waits, printed, text = rank_raises(AssertionError("a bug"), 1, *arguments)
    # Python itself prints it on stderr
    assert 1 <= waits[0] <= 5 and text.startswith("Traceback") and "a bug" in text
    assert rank_raises(KeyboardInterrupt(), 1, *arguments) == ([], "", None)


NCCL_ERRORS = [  # as NCCL 2.27 prints them
    ("unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
     "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device"
     " error. \nLast error:\nError while creating shared memory segment /dev/shm/nccl-y4qSGA (size"
     " 9637888), error: No space left on device (28)",
     "error: Error while creating shared memory segment /dev/shm/nccl-y4qSGA (size 9637888), error:"
     " No space left on device (28) (NCCL error in: NCCLUtils.cpp:94, unhandled system error"),
    ("invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\n"
     "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
     "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
     "error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000 ("),
    ("remote process exited or there was a network error, NCCL version 2.27.5\nncclRemoteError: A"
     " call failed possibly due to a network error or a remote process exiting prematurely.\n"
     "Last error:\nsocketProgress: Connection closed by remote peer node1<41234>",
     "error: rank 0 lost the connection to another rank"),
    ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE)"
     " ran for 600012 milliseconds before timing out.", "may need NCCL_P2P_DISABLE=1\n")]


@pytest.mark.parametrize("text, expected", NCCL_ERRORS)
def test_an_error_of_nccl_is_nccls_own_last_error(text, expected, tmp_path, monkeypatch, capsys):
    """All were "lost the connection to another rank: see what that one printed"."""
    error = torch.distributed.DistBackendError(f"NCCL error in: NCCLUtils.cpp:94, {text}")
    printed = rank_raises(error, 0, tmp_path, monkeypatch, capsys)[1]
    assert expected in printed and printed.count("\n") == 1


def test_a_port_in_use_is_one_line_that_names_it(tmp_path, monkeypatch, capsys):
    """It was "lost the connection to another rank"."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(torch.distributed.DistNetworkError) as e:
            torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)
    monkeypatch.setenv("MASTER_PORT", str(port))
    printed = rank_raises(e.value, 0, tmp_path, monkeypatch, capsys)[1]
    assert printed.startswith(f"error: port {port} is in use") and printed.count("\n") == 1


# -----------------------------------------------------------------------------
# the interpreter

@pytest.mark.parametrize("below", [True, False])
def test_a_printed_command_works_when_pasted_in_the_current_folder(below, tmp_path):
    """./train.sh ended with "samples: python sample.py", where the shell had no python."""
    cwd = sys.prefix if below else tmp_path
    code = "from run.cli import command; print(command('convert.py', '--help'))"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ROOT}
    line = python("-c", code, cwd=cwd, env=env).stdout.strip()
    process = subprocess.run(line, shell=True, cwd=cwd, env=env, capture_output=True, text=True)
    assert process.returncode == 0 and "usage: convert.py" in process.stdout, line
    short = os.path.relpath(sys.executable, cwd)
    assert line.startswith(f"{short if below else sys.executable} ")


def test_a_printed_command_says_python_if_that_is_this_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    monkeypatch.chdir(ROOT)
    assert cli.command("sample.py", "log/a b") == "python sample.py 'log/a b'"
    # cmd.exe takes single quotes for a part of the name
    monkeypatch.setattr(cli, "interpreter", lambda: r".venv\Scripts\python.exe")
    monkeypatch.setattr(sys, "platform", "win32")
    printed = cli.command("sample.py", r"log\a b")
    assert printed == r'.venv\Scripts\python.exe sample.py "log\a b"'


@pytest.mark.skipif(sys.platform == "win32", reason="its environments have another layout")
def test_a_missing_package_is_one_line_that_names_the_interpreter_to_use(tmp_path):
    """It was a traceback without a word of .venv."""
    for folder in ("run", "bench"):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder)
    for script in SCRIPTS:
        if script != "bench":
            shutil.copy(os.path.join(ROOT, script), tmp_path)
        # -S: without site-packages
        process = python("-S", *script_arguments(script, tmp_path), cwd=tmp_path)
        expected = f"error: {sys.executable} has no package "
        assert process.returncode == 2 and process.stderr.startswith(expected), process.stderr
        assert process.stderr.count("\n") == 1
        assert "./train.sh installs all packages into .venv" in process.stderr
    os.makedirs(tmp_path / ".venv" / "bin")
    (tmp_path / ".venv" / "bin" / "python").touch()
    process = python("-S", "sample.py", "gpt2", cwd=tmp_path)
    assert process.stderr.endswith("has no package torch: use .venv/bin/python\n")


# -----------------------------------------------------------------------------
# Ctrl-C during the imports

INTERRUPTED_IMPORT = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGINT)
print("not interrupted")
sys.exit(0)
"""
def interrupted_imports(scripts, handler, tmp_path):
    """[(script, status, output)] of scripts that get SIGINT when they import torch."""
    (tmp_path / "torch.py").write_text(INTERRUPTED_IMPORT)  # found before the real one
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    started = []
    for script in scripts:  # they inherit handler
        command = [sys.executable, *script_arguments(script)]
        started.append(subprocess.Popen(command, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        preexec_fn=lambda: signal.signal(signal.SIGINT, handler)))
    results = []
    for script, process in zip(scripts, started):
        output = process.communicate(timeout=60)[0]
        results.append((script, process.returncode, output))
    return results


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_during_the_imports_prints_nothing(tmp_path):
    """It printed a traceback of up to 62 lines."""
    for script, status, output in interrupted_imports(SCRIPTS, signal.SIG_DFL, tmp_path):
        expected = "loading PyTorch\n" if script == "train_gpt2.py" else ""
        assert (status, output) == (-signal.SIGINT, expected), script
    # ignored by the parent, as a shell does for `command &`: it stays ignored
    ignored = interrupted_imports(["sample.py"], signal.SIG_IGN, tmp_path)
    assert ignored == [("sample.py", 0, "not interrupted\n")]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_at_any_moment_of_the_start_prints_at_most_one_line(script, tmp_path):
    # on a busy machine Python itself takes up to 0.2 s to start
    for delay in (0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0):
        arguments = []
        if script == "train_gpt2.py":
            arguments = ["--preset", "shakespeare", "--compile", "off", "--max-steps", "3"]
        elif script == "bench":
            # limitation: the fresh processes of a benchmark print a traceback; without the file to
            # compare with, none is started
            arguments = ["--compare", "nowhere.json"]
        command = [sys.executable, *script_arguments(script), *arguments]
        process = subprocess.Popen(command, cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1"},
                                   start_new_session=True)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # the group, as the terminal does
        err = process.communicate(timeout=120)[1]
        assert "Traceback" not in err and len(err.strip().splitlines()) <= 1, (delay, err)


def test_ctrl_c_raises_in_main_and_ends_the_process_at_once_after_it(monkeypatch):
    """Between imports and the end of main() it is one line; later it would be a traceback."""
    handlers = [signal.signal(signal.SIGINT, signal.SIG_DFL)]
    try:
        run_main(lambda: handlers.append(signal.getsignal(signal.SIGINT)))
        handlers.append(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, handlers[0])
    assert handlers[1:] == [signal.default_int_handler, signal.SIG_DFL]


# -----------------------------------------------------------------------------
# printing

def test_print0_prints_only_on_rank_0(capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        cli.print0("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"


@pytest.mark.parametrize("text, value", [
    ("5B", 5 * 10**9), ("5e9", 5 * 10**9), ("1.5b", 1500 * 10**6), ("10k", 10_000),
    ("0.5K", 500), ("100M", 10**8), ("-2", -2), ("1_000", 1000), (" 7 ", 7), (7, 7)])
def test_an_integer_may_have_an_exponent_or_a_unit(text, value):
    assert number(int)(text) == value and type(number(int)(text)) is int


@pytest.mark.parametrize("text", ["0.5", "1.5e0", "5T", "B", "1e", "1e99B", "9e18K", "1e-3",
                                  str(2**63), "nan", "inf", 1.5, None])
def test_another_text_is_not_an_integer(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer$"):
        number(int)(text)


@pytest.mark.parametrize("parse, value, message", [
    (number(int, 1), "0", "0: must be an integer, 1 or more"),
    (number(float), "nan", "nan: must be a number"), (number(float), "-inf", "a number"),
    (number(float), None, "None: must be a number"),
    (number(float, low=0, above=0, high=1), "0", "0: must be a number, above 0 and at most 1")])
def test_a_number_outside_of_its_range_is_an_error_that_says_what_is_allowed(parse, value, message):
    assert number(float, above=0, high=1)(1) == 1.0
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message) + "$"):
        parse(value)


def test_underscores_are_accepted_in_flags_but_kept_in_values():
    parser = cli.ArgumentParser()
    parser.add_argument("--max-new-tokens", type=number(int, 1))
    parser.add_argument("--out")
    args = parser.parse_args(["--max_new_tokens=3", "--out", "a_b"])
    assert (args.max_new_tokens, args.out) == (3, "a_b")
    assert parser.parse_args(["--out=--c_d"]).out == "--c_d"


@pytest.mark.parametrize("name, suggestion", [
    ("--max-new-token", "--max-new-tokens"), ("--length", "--max-new-tokens"),
    ("--start=x", "--prompt"), ("--promt", "--prompt")])
def test_an_unknown_flag_gets_a_suggestion(name, suggestion):
    parser = cli.ArgumentParser()
    for flag in ("--max-new-tokens", "--prompt"):
        parser.add_argument(flag)
    name_of_flag = name.partition("=")[0]
    with pytest.raises(ValueError, match=f"unknown flag {name_of_flag}: did you mean {suggestion}"):
        parser.parse_args([name, "1"])


@pytest.mark.parametrize("arguments, expected", [
    ("train_gpt2.py --wandb", "unknown flag --wandb: did you mean --tracker wandb?"),
    ("train_gpt2.py --config x.yaml", "unknown flag --config: did you mean --preset?"),
    ("train_gpt2.py --preset gpt2", ": did you mean gpt2-124M?"),
    ("train_gpt2.py --preset 124M", ": did you mean gpt2-124M?"),
    ("train_gpt2.py --compile=False", "auto"),
    ("sample.py", "the following arguments are required: MODEL;")])
def test_what_newcomers_type_gets_a_hint(arguments, expected, monkeypatch):
    script, *flags = arguments.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(ValueError, match=re.escape(expected)):
        importlib.import_module(script.removesuffix(".py")).parse_args()


def test_intermixed_arguments_are_parsed_alike_by_newer_versions_of_python(monkeypatch):
    """3.12.8 and 3.13.1 no longer call parse_known_args there: sample.py lost --num_samples."""
    parser = cli.ArgumentParser()
    parser.add_argument("source", nargs="*")
    parser.add_argument("--num-samples", type=int)
    # as they parse: without a call of the method that a subclass overrides
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args",
                        argparse.ArgumentParser.parse_known_args)
    args = parser.parse_intermixed_args(["a", "--num_samples", "2"])
    assert vars(args) == {"source": ["a"], "num_samples": 2}
    with pytest.raises(ValueError, match="unknown flag --num-sample: did you mean --num-samples"):
        parser.parse_intermixed_args(["a", "--num-sample=2"])


# -----------------------------------------------------------------------------
# signals

def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGUSR1"), ("SIGUSR1", "SIGTERM"),
                                           ("SIGINT", "SIGTERM")])
def test_signals_only_note_the_first_stop_request(first, second, capsys):
    handlers = [signal.getsignal(getattr(signal, name)) for name in StopSignals.STATUS]
    with StopSignals() as signals:
        assert StopSignals.received is None
        for name in (first, second):
            os.kill(os.getpid(), getattr(signal, name))
            wait_until(lambda: StopSignals.received
                       and not select.select([signals.reader], [], [], 0)[0])  # the thread read it
            assert StopSignals.received == first
        hint = "; Ctrl-C again stops at once" if first == "SIGINT" else ""
        message = f"{first}: stop requested; finishing the step, then saving{hint}\n"
        assert capsys.readouterr().out == message
    assert StopSignals.received is None
    assert handlers == [signal.getsignal(getattr(signal, name)) for name in StopSignals.STATUS]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
def test_a_signal_at_the_end_of_a_context_is_not_noted_after_it():
    """The thread of an earlier context noted it later: the next one began with a stop request."""
    for _ in range(30):
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.002)
        assert StopSignals.received is None


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_is_a_stop_request_unless_it_is_ignored():
    """SIGHUP once ended a run without a save; under nohup it is ignored and must stay so."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(lambda: StopSignals.received == "SIGHUP")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class ClosedStream:
    """A stdout whose reader has gone."""

    def write(self, text):
        raise OSError(5, "Input/output error")

    flush = fileno = write


class ClosedStdout(ClosedStream):
    """It has a file descriptor."""

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


def test_a_closed_stdout_is_a_stop_request_while_training_and_an_error_elsewhere(
        monkeypatch, capsys):
    with StopSignals():
        monkeypatch.setattr(sys, "stdout", ClosedStdout())
        for _ in range(2):
            cli.print0("step 1")
        assert (StopSignals.received, StopSignals.STATUS["SIGPIPE"]) == ("SIGPIPE", 141)
    monkeypatch.setattr(sys, "stdout", ClosedStdout())
    with pytest.raises(OSError):
        cli.print0("step 2")
    monkeypatch.undo()
    assert capsys.readouterr().err == ("stdout cannot be written (Input/output error): stop"
                                       " requested; finishing the step, then saving\n")


def test_errors_are_printed_or_dropped_when_stderr_is_gone_but_never_raise(monkeypatch):
    monkeypatch.setattr(sys, "stderr", ClosedStream())
    with pytest.raises(SystemExit) as end:
        run_main(raising(ValueError("no data")))
    assert end.value.code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGPIPE"])
def test_ctrl_c_after_any_stop_request_ends_the_process_at_once(first, monkeypatch):
    """Only a second Ctrl-C did: after SIGTERM or a closed stdout none ended a hanging process."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)

    with StopSignals():
        if first == "SIGPIPE":
            monkeypatch.setattr(sys, "stdout", ClosedStdout())
            cli.print0("step 1")
        else:
            os.kill(os.getpid(), getattr(signal, first))
        wait_until(lambda: StopSignals.received == first)
        StopSignals.since -= 1  # within half a second it would be torchrun's duplicate
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: statuses == [130])
