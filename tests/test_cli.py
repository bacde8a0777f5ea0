"""
Flags, errors and exit statuses of a script, on one and on several ranks, Ctrl-C, printing, and signals that stop a run.

    .venv/bin/python -m pytest tests/test_cli.py

Needs only requirements-dev.txt.
"""
import argparse
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from run import cli
from run.cli import StopSignals, number, run_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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


def test_a_user_error_is_one_line_and_status_2(capsys):
    assert exit_of(raising(ValueError("T=5: must be 1")), capsys) == (2, "error: T=5: must be 1\n")
    status, line = exit_of(lambda: open("nowhere.txt"), capsys)
    assert status == 2 and line.startswith("error: ") and "nowhere.txt" in line
    assert exit_of(raising(OSError(28, "No space left")), capsys) == (2, "error: [Errno 28] No space left\n")


def test_ctrl_c_is_status_130_without_a_traceback(capsys):
    assert exit_of(raising(KeyboardInterrupt()), capsys) == (130, "\ninterrupted\n")


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


@pytest.mark.parametrize("status, printed", [(0, ""), (1, "AssertionError: a bug"), (2, "error: no such thing")])
def test_under_torchrun_a_script_exits_with_its_status_while_a_thread_runs(status, printed, tmp_path):
    process = subprocess.run([sys.executable, "-c", THREADS_IN_CPP, str(status)], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "RANK": "0", "PYTHONPATH": ROOT}, timeout=60)
    assert process.returncode == status and printed in process.stderr, process.stderr
    assert process.stdout == "atexit\n"


def test_a_bug_keeps_its_traceback_and_success_is_status_0():
    with pytest.raises(AssertionError, match="a bug"):
        run_main(raising(AssertionError("a bug")))
    assert run_main(lambda: None) is None


def test_an_invalid_flag_is_one_line(capsys):
    parser = cli.ArgumentParser(prog="x.py")
    parser.add_argument("--steps", type=int, choices=(1, 2))
    for arguments, words in ((["--step", "1"], "unknown flag --step: did you mean --steps"),
                             (["--steps", "3"], "invalid choice: 3"),
                             (["--steps"], "expected one argument")):
        status, line = exit_of(lambda arguments=arguments: parser.parse_args(arguments), capsys)
        assert status == 2 and words in line and line.startswith("error: ") and line.count("\n") == 1


# -----------------------------------------------------------------------------
# errors of several ranks

def rank_raises(error, rank, tmp_path, monkeypatch, capsys):
    """(seconds that a rank waits before it prints an error, what it prints, torchrun's error file)."""
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
    text = json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"] if path.exists() else None
    return waits, capsys.readouterr().err, text


def test_rank_0_prints_an_error_first_and_the_rank_that_lost_the_connection_last(tmp_path, monkeypatch, capsys):
    """torchrun ends the other ranks when one has ended; without the wait each rank printed, some of them a traceback."""
    arguments = tmp_path, monkeypatch, capsys
    assert rank_raises(ValueError("no data"), 0, *arguments) == ([], "error: no data\n", "error: no data")
    waits, printed, _ = rank_raises(ValueError("no data"), 1, *arguments)
    assert 1 <= waits[0] <= 5 and printed == "error: no data\n"
    for lost in (RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
                 torch.distributed.DistNetworkError("The client socket has failed to connect")):
        later, printed, text = rank_raises(lost, 0, *arguments)
        assert later[0] > waits[0] and printed.startswith("error: rank 0 lost the connection to another rank")
        assert printed == text + "\n"
    waits, printed, text = rank_raises(AssertionError("a bug"), 1, *arguments)
    assert 1 <= waits[0] <= 5 and text.startswith("Traceback") and "a bug" in text  # Python itself prints it on stderr
    assert rank_raises(KeyboardInterrupt(), 1, *arguments) == ([], "", None)


# -----------------------------------------------------------------------------
# Ctrl-C during the imports

INTERRUPTED_IMPORT = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGINT)
print("not interrupted")
sys.exit(0)
"""
# the scripts, with arguments that they accept
SCRIPTS = {"train_gpt2.py": [], "fineweb.py": ["--verify", "shards"], "hellaswag.py": ["gpt2"], "sample.py": ["gpt2"],
           "convert.py": ["info", "gpt2"], "plots.py": ["gpt2"], "bench": ["loader"]}


def script_command(script):
    """The command line of a script, or of the package bench."""
    return [sys.executable, *(["-m", "bench"] if script == "bench" else [os.path.join(ROOT, script)]), *SCRIPTS[script]]


def interrupted_imports(scripts, handler, tmp_path):
    """[(script, status, output)] of scripts that receive SIGINT, inherited with a handler, when they import torch."""
    (tmp_path / "torch.py").write_text(INTERRUPTED_IMPORT)  # found before the real one
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    started = [subprocess.Popen(script_command(script), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, handler))
               for script in scripts]
    return [(script, process.wait(timeout=60), process.communicate()[0]) for script, process in zip(scripts, started)]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_during_the_imports_prints_nothing(tmp_path):
    """It printed a traceback of up to 62 lines."""
    assert interrupted_imports(SCRIPTS, signal.SIG_DFL, tmp_path) == [
        (script, -signal.SIGINT, "loading PyTorch\n" * (script == "train_gpt2.py")) for script in SCRIPTS]
    # ignored by the parent, as a shell does for `command &`: it stays ignored
    assert interrupted_imports(["sample.py"], signal.SIG_IGN, tmp_path) == [("sample.py", 0, "not interrupted\n")]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_at_any_moment_of_the_start_prints_at_most_one_line(script, tmp_path):
    for delay in (0.1, 0.2, 0.4, 0.7, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0):
        # limitation: the fresh processes of a benchmark print a traceback; without the file to compare with, none is started
        arguments = {"train_gpt2.py": ["--preset", "shakespeare", "--compile", "off", "--max-steps", "3"],
                     "bench": ["--compare", "nowhere.json"]}.get(script, [])
        process = subprocess.Popen([*script_command(script), *arguments], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                   env={**os.environ, "PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1"})
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # the group, as the terminal does
        err = process.communicate(timeout=120)[1]
        assert "Traceback" not in err and len(err.strip().splitlines()) <= 1, (delay, err)


def test_ctrl_c_raises_in_main_and_ends_the_process_at_once_after_it(monkeypatch):
    """Between the imports and the end of main() it is one line; in interpreter shutdown it would be a traceback."""
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


def test_a_number_outside_of_its_range_is_an_error_that_says_what_is_allowed():
    assert number(int, 1)("7") == 7 and number(float, 0)("1e-3") == 1e-3 and number(float, above=0, high=1)(1) == 1.0
    for text, value in (("5B", 5 * 10**9), ("5e9", 5 * 10**9), ("1.5b", 1500 * 10**6), ("10k", 10_000), ("100M", 10**8),
                        ("-2", -2), ("1_000", 1000), (" 7 ", 7), ("0.5K", 500)):
        assert number(int)(text) == value and type(number(int)(text)) is int
    for text in ("0.5", "1.5e0", "5T", "B", "1e", "1e99B", "9e18K", "0x10", "1e-3", "e5"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be an integer"):
            number(int)(text)
    for parse, value, words in ((number(int, 1), "0", "0: must be an integer, 1 or more"), (number(int), "1.5", "an integer"),
                                (number(int), 1.5, "1.5: must be an integer"), (number(int, 0), str(2**63), "0 or more"),
                                (number(float), "nan", "nan: must be a number"), (number(float), "-inf", "a number"),
                                (number(float, 0), "-1", "must be a number, 0 or more"), (number(float), None, "None"),
                                (number(float, above=0, high=1), "0", "0: must be a number, above 0 and at most 1")):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(words)):
            parse(value)


def test_underscores_are_accepted_in_flags_but_kept_in_values():
    parser = cli.ArgumentParser()
    parser.add_argument("--max-new-tokens", type=number(int, 1))
    parser.add_argument("--out")
    args = parser.parse_args(["--max_new_tokens=3", "--out", "a_b"])
    assert (args.max_new_tokens, args.out) == (3, "a_b")
    assert parser.parse_args(["--out=--c_d"]).out == "--c_d"


@pytest.mark.parametrize("name, suggestion", [("--max-new-token", "--max-new-tokens"), ("--length", "--max-new-tokens"),
                                              ("--start=x", "--prompt"), ("--promt", "--prompt")])
def test_an_unknown_flag_gets_a_suggestion(name, suggestion):
    parser = cli.ArgumentParser()
    for flag in ("--max-new-tokens", "--prompt"):
        parser.add_argument(flag)
    with pytest.raises(ValueError, match=f"unknown flag {name.partition('=')[0]}: did you mean {suggestion}"):
        parser.parse_args([name, "1"])


def test_intermixed_arguments_are_parsed_alike_by_newer_versions_of_python(monkeypatch):
    """From 3.12.8 and 3.13.1 on, argparse no longer calls parse_known_args there: sample.py lost --num_samples."""
    parser = cli.ArgumentParser()
    parser.add_argument("source", nargs="*")
    parser.add_argument("--num-samples", type=int)
    # as they parse: without a call of the method that a subclass overrides
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args", argparse.ArgumentParser.parse_known_args)
    assert vars(parser.parse_intermixed_args(["a", "--num_samples", "2"])) == {"source": ["a"], "num_samples": 2}
    with pytest.raises(ValueError, match="unknown flag --nsamples: did you mean --num-samples"):
        parser.parse_intermixed_args(["a", "--nsamples=2"])


def test_control_characters_of_an_error_message_do_not_reach_the_terminal(capsys):
    def main():
        raise ValueError("bad \x1b[31mred\x1b[0m\nfield")
    status, line = exit_of(lambda: run_main(main), capsys)
    assert status == 2 and line == "error: bad \\x1b[31mred\\x1b[0m field\n"


# -----------------------------------------------------------------------------
# signals

@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGUSR1"), ("SIGUSR1", "SIGTERM"), ("SIGINT", "SIGTERM")])
def test_signals_only_note_the_first_stop_request(first, second, capsys):
    handlers = [signal.getsignal(getattr(signal, name)) for name in StopSignals.STATUS]
    with StopSignals() as signals:
        assert StopSignals.received is None
        for name in (first, second):
            os.kill(os.getpid(), getattr(signal, name))
            deadline = time.monotonic() + 30
            while StopSignals.received is None or select.select([signals.reader], [], [], 0)[0]:  # the thread has read it
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert StopSignals.received == first
        assert capsys.readouterr().out == (f"{first}: stop requested; finishing the step, then saving"
                                           + "; Ctrl-C again stops at once" * (first == "SIGINT") + "\n")
    assert StopSignals.received is None
    assert [signal.getsignal(getattr(signal, name)) for name in StopSignals.STATUS] == handlers


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
def test_a_signal_at_the_end_of_a_context_is_not_noted_after_it():
    """The thread of an earlier context noted it later: the next context began with a stop request."""
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
            deadline = time.monotonic() + 30
            while StopSignals.received is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert (StopSignals.received, StopSignals.STATUS["SIGHUP"]) == ("SIGHUP", 129)
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


def test_a_closed_stdout_is_a_stop_request_while_training_and_an_error_elsewhere(monkeypatch, capsys):
    with StopSignals():
        monkeypatch.setattr(sys, "stdout", ClosedStdout())
        for _ in range(2):
            cli.print0("step 1")
        assert (StopSignals.received, StopSignals.STATUS["SIGPIPE"]) == ("SIGPIPE", 141)
    monkeypatch.setattr(sys, "stdout", ClosedStdout())
    with pytest.raises(OSError):
        cli.print0("step 2")
    monkeypatch.undo()
    assert capsys.readouterr().err == ("stdout cannot be written (Input/output error): stop requested; finishing the step,"
                                       " then saving\n")


def test_errors_are_printed_or_dropped_when_stderr_is_gone_but_never_raise(monkeypatch):
    monkeypatch.setattr(sys, "stderr", ClosedStream())
    with pytest.raises(SystemExit) as end:
        run_main(raising(ValueError("no data")))
    assert end.value.code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGPIPE"])
def test_ctrl_c_after_any_stop_request_ends_the_process_at_once(first, monkeypatch):
    """Only a second Ctrl-C did: after SIGTERM or a closed stdout no number of them ended a process that hangs."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)

    def wait_until(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with StopSignals():
        if first == "SIGPIPE":
            monkeypatch.setattr(sys, "stdout", ClosedStdout())
            cli.print0("step 1")
        else:
            os.kill(os.getpid(), getattr(signal, first))
        wait_until(lambda: StopSignals.received == first)
        StopSignals.since -= 1  # within half a second it would be a duplicate, which torchrun forwards
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: statuses == [130])
