"""
The command line that all scripts share: printing, flags, exit statuses, signals.

    from run.cli import run_main, start
    if __name__ == "__main__":
        start(parse_args)  # above the slow imports: --help and an invalid flag end the process here
    import torch
    ...
    if __name__ == "__main__":
        run_main(main)     # main() with one-line errors and exit statuses

main() parses the flags again, whether the file is run or imported. PyTorch takes more than a second
to import: this file must not import it, nor anything else that is slow.
"""
import argparse
import atexit
import contextlib
import decimal
import difflib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the scripts

# -----------------------------------------------------------------------------
# a script: printing, flags, exit statuses

def is_rank0():
    """Whether this process prints: rank 0 of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print0(*args, **kwargs):
    """print on rank 0 only, flushed.

    While training, a stdout that is closed or full is a stop request instead of an error.
    """
    if not is_rank0():
        return
    try:
        print(*args, **kwargs, flush=True)
    except OSError as e:
        discard_stdout()
        if not StopSignals.active:
            raise
        if StopSignals.request("SIGPIPE"):
            print_error(f"stdout cannot be written ({e.strerror}): stop requested;"
                        " finishing the step, then saving")


def print_error(*args):
    """print on stderr; nothing if it is gone, as after its terminal was closed."""
    with contextlib.suppress(OSError):
        print(*args, file=sys.stderr, flush=True)


def discard_stdout():
    """Discards what is printed from now on: on a closed stdout each flush, also at exit, fails."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def short_path(path):
    """The absolute path, or the relative one of what lies below the current folder."""
    return os.path.abspath(path).removeprefix(os.path.join(os.getcwd(), ""))


def interpreter():
    """The command that starts this Python: python, if the shell finds this one, or its path."""
    found = shutil.which("python")
    is_this = (found is not None and os.path.dirname(found) == os.path.dirname(sys.executable)
               and os.path.samefile(found, sys.executable))
    return "python" if is_this else short_path(sys.executable)


def command(script, *arguments):
    """The command line of one of our scripts, which can be pasted in the current folder.

    command("sample.py", "log/a") is "python sample.py log/a" in an activated environment, and
    ".venv/bin/python sample.py log/a" after ./train.sh.
    """
    words = [interpreter(), short_path(os.path.join(ROOT, script)), *arguments]
    # Windows' shells take no single quotes, in which shlex puts its paths
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def duration(seconds):
    """A duration in its largest unit: 4000 -> "1.1 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def report_progress(label):
    """A function of the fraction done that prints "label: 25%, 3.0 min left".

    It prints rarely: after 5 s, then when 5 s or 10% of the elapsed time have passed.
    """
    start = last = time.monotonic()

    def report(fraction):
        nonlocal last
        now = time.monotonic()
        elapsed = now - start
        if now - last >= max(5, elapsed / 10) and 0 < fraction < 1:
            last = now
            print0(f"{label}: {fraction:.0%}, {duration(elapsed / fraction - elapsed)} left")
    return report


# flags of nanoGPT and of transformers, and the names of ours
SYNONYMS = {
    "out-dir": "log-dir", "dataset": "data", "start": "prompt", "learning-rate": "lr",
    "max-iters": "max-steps", "lr-decay-iters": "max-steps", "warmup-iters": "warmup-steps",
    "min-lr": "min-lr-ratio", "eval-interval": "val-every", "eval-iters": "val-tokens",
    "gradient-accumulation-steps": "total-batch-size", "config": "preset",
    "wandb": "tracker wandb", "wandb-log": "tracker wandb", "wandb-project": "tracker wandb",
    "wandb-run-name": "exp-name",
    # transformers
    "output-dir": "log-dir", "run-name": "exp-name", "model-name-or-path": "init-from",
    "num-train-epochs": "epochs", "per-device-train-batch-size": "batch-size",
    "lr-scheduler-type": "schedule", "max-grad-norm": "grad-clip", "eval-steps": "val-every",
    "save-steps": "save-every", "gradient-checkpointing": "activation-checkpointing",
    "tokens": "max-new-tokens", "length": "max-new-tokens", "max-length": "max-new-tokens",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but an invalid flag raises ValueError: one line, without the usage text.

    --max_steps is --max-steps; an unknown flag gets the most similar one as a suggestion. doc is a
    script's docstring: --help has its first paragraph, and its first block of commands as examples.
    """

    def __init__(self, doc=None, **kwargs):
        if doc is not None:
            summary = doc.strip().partition("\n\n")[0]
            commands = re.search(r"(?:^    .+\n)+", doc, re.MULTILINE)[0]
            kwargs["description"] = textwrap.fill(summary, 78)
            kwargs["epilog"] = f"examples:\n{commands}"
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        result = super().parse_known_args(with_hyphens(args), namespace)
        return self._suggest(*result)

    def parse_known_intermixed_args(self, args=None, namespace=None):
        # Python 3.12.8, 3.13.1 and later no longer call parse_known_args from here
        result = super().parse_known_intermixed_args(with_hyphens(args), namespace)
        return self._suggest(*result)

    def _suggest(self, namespace, unknown):
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for argument in unknown:
            name = argument.partition("=")[0]
            if not name.startswith("--"):
                continue
            similar = [flag for flag in flags if flag.startswith(name)]
            similar += difflib.get_close_matches(name, flags, cutoff=0.75)
            synonym = "--" + SYNONYMS.get(name[2:], "")
            if synonym.split()[0] in flags:
                similar.insert(0, synonym)
            if similar:
                self.error(f"unknown flag {name}: did you mean {similar[0]}?")
        return namespace, unknown

    def error(self, message):
        message = re.sub(r"^argument (--[\w-]+):", r"\1", message)
        invalid = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if invalid:
            choices = re.findall(r"[\w.-]+", invalid[2])
            similar = [choice for choice in choices if invalid[1].lower() in choice.lower()]
            if similar:
                message += f": did you mean {similar[0]}?"
        raise ValueError(f"{message}; --help lists what is allowed")


def with_hyphens(args):
    """args, by default the command line's, with "-" for "_" in the names of flags."""
    if args is None:
        args = sys.argv[1:]
    return [re.sub(r"^--\w[\w-]*", lambda name: name[0].replace("_", "-"), arg) for arg in args]


MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def integer(text):
    """The int of a text such as "5000000", "5e6" or "5M"; K is 10**3, M is 10**6, B is 10**9."""
    digits, multiple = re.fullmatch(r"(.*?)([KMB]?)", text.strip(), re.IGNORECASE).groups()
    result = decimal.Decimal(digits) * MULTIPLES[multiple.upper()]
    if abs(result) >= 2**63 or result != result.to_integral_value():
        raise ValueError(f"{text} is not an integer of 64 bits")
    return int(result)


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """The type of a flag (argparse's type=) whose value is an int or a float.

    low <= value <= high, and value > above; an int may be written as 5e9 or 5B. NaN, infinity and
    integers of more than 64 bits are refused. ArgumentTypeError names what is allowed.
    number(float, above=0, high=1)("0") raises "0: must be a number, above 0 and at most 1".
    """
    limits = []
    if above > -math.inf:
        limits.append(f"above {above:g}")
    if low > above:
        limits.append(f"{low:g} or more")
    if high < math.inf:
        limits.append(f"at most {high:g}")
    allowed = "an integer" if kind is int else "a number"
    if limits:
        allowed += ", " + " and ".join(limits)

    def parse(value):
        try:
            result = integer(str(value)) if kind is int else float(value)
            valid = low <= result <= high and result > above and math.isfinite(result)
        except (ValueError, TypeError, OverflowError, decimal.DecimalException):
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"{str(value)[:40]}: must be {allowed}")
        return result
    return parse


def printable(text):
    r"""text without control characters, which may come from a file: "\x1b[31m" -> r"\x1b[31m"."""
    def escaped(c):
        return c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
    return "".join(map(escaped, text))


def first_line(error):
    """An exception's type and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return printable(f"{type(error).__name__}: {message[:200]}")


def start(parse_args):
    """What a script does before its slow imports: --help, an invalid flag, Ctrl-C, OpenMP."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C during the imports, which take seconds, ends the process without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin for milliseconds at the end of each operation before they sleep. If
        # other processes use the cores too, a spinning thread takes the core of one that still
        # works: steps took 3 to 4 times as long. 3000 rounds take about 10 us, which costs nothing.
        # torch reads the variable when it is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    sys.excepthook = report_missing_package
    run_and_report(parse_args)


def report_missing_package(kind, error, trace):
    """sys.excepthook: a package that is not installed is one line and status 2."""
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    venv = os.path.join(ROOT, ".venv")
    python = os.path.join(venv, "bin", "python")
    if sys.prefix != venv and os.path.exists(python):
        remedy = f"use {short_path(python)}"
    else:
        remedy = (f"./train.sh installs all packages into .venv; or {interpreter()} -m pip install"
                  f" -r {short_path(os.path.join(ROOT, 'requirements.txt'))}")
    print_error(f"error: {sys.executable} has no package {error.name}: {remedy}")
    sys.exit(2)


def run_main(main):
    """Runs a script's main(): a user error is one line and status 2; a bug keeps its traceback.

    Ctrl-C is status 130. Under torchrun the process exits without interpreter shutdown: gloo's
    threads may still need the interpreter then, which would abort the process.
    """
    status = 1  # for an exception that is not caught below: a bug
    if "RANK" in os.environ:
        atexit.register(lambda: exit_now(status))  # registered first, so it runs last
    is_default = signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # set by start()
    try:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run_and_report(main)
        status = 0
    except SystemExit as e:
        status = e.code or 0
        raise
    finally:
        if is_default:  # Ctrl-C during interpreter shutdown would print a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def exit_now(status):
    """Ends the process without interpreter shutdown, after flushing what it printed."""
    with contextlib.suppress(OSError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def run_and_report(main):
    """Runs main(); prints expected errors as one line and turns them into exit statuses."""
    try:
        if hasattr(sys.stdout, "reconfigure"):  # for characters that the terminal cannot encode
            sys.stdout.reconfigure(errors="backslashreplace")
        main()
    except KeyboardInterrupt:
        if is_rank0():
            print_error("\ninterrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it: `python sample.py ... | head`
        discard_stdout()
        sys.exit(1)
    except Exception as e:
        message = message_of(e)
        wait_for_root_cause(e)
        report_to_torchrun(f"error: {message}" if message else traceback.format_exc())
        if message is None:
            raise
        print_error("error:", printable(message.replace("\n", " ")))
        sys.exit(2)


def message_of(error):
    """The one line of an expected error; None for a bug."""
    if isinstance(error, (ValueError, OSError)):  # FileNotFoundError, a full disk
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory: {error}"
    if not isinstance(error, RuntimeError):
        return None
    if is_lost_connection(error):
        return (f"rank {os.environ['RANK']} lost the connection to another rank: see what that one"
                f" printed ({first_line(error)})")
    import torch.distributed  # imported already, where its errors occur
    if isinstance(error, torch.distributed.DistError):
        return message_of_dist_error(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition("\n")[0][:120]
        return f"out of GPU memory; use a smaller --batch-size ({reason})"
    if "can't allocate memory" in str(error):  # torch's CPU allocator
        return f"out of memory: {error}"
    return None


# of gloo, of the store, and of NCCL
LOST_CONNECTION = ("Connection closed by peer|Connection reset by peer|Broken pipe|"
                   "Connection refused|Timed out waiting|failed to connect|wait timeout|"
                   "ncclRemoteError")


def is_lost_connection(error):
    """Whether a collective failed because another rank has ended."""
    return ("RANK" in os.environ and isinstance(error, RuntimeError)
            and re.search(LOST_CONNECTION, str(error)) is not None)


def message_of_dist_error(text):
    """The line of an error of torch.distributed on this rank: of the port, or NCCL's own."""
    if "EADDRINUSE" in text:
        return (f"port {os.environ.get('MASTER_PORT')} is in use, perhaps by another run: choose"
                " another one by MASTER_PORT, or by torchrun's --rdzv_endpoint or --master_port")
    first = text.partition("\n")[0]
    cause = text.partition("Last error:")[2].strip()  # NCCL's
    message = f"{cause} ({first})" if cause else first
    if "collective operation timeout" in text:
        message += "; GPUs without peer-to-peer access may need NCCL_P2P_DISABLE=1"
    return message


def wait_for_root_cause(error):
    """Under torchrun, gives the rank that has the cause of an error the time to print it first.

    Most errors occur on every rank: rank 0 prints them. When it ends, torchrun ends the others,
    which are waiting here.
    """
    if "RANK" not in os.environ:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's
    if is_lost_connection(error):
        time.sleep(10)
    elif not is_rank0():
        time.sleep(3)


def report_to_torchrun(text):
    """Writes an error into the file that torchrun reads for its summary, under torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as f:
        json.dump({"message": {"message": text, "extraInfo": extra}}, f)


# -----------------------------------------------------------------------------
# signals

class StopSignals:
    """Context in which signals, and a closed stdout, only request a stop: training saves first.

    The signals are SIGTERM, SIGUSR1, Ctrl-C, and SIGHUP, which a closed terminal sends, unless it
    is ignored (nohup). StopSignals.received is the name of the first one, or None;
    parallel.stop_requested agrees on it across ranks. Ctrl-C after a stop request ends the process
    at once, even inside a collective that hangs.
    """
    # Exit status after a stop. 75 is EX_TEMPFAIL of sysexits.h, a temporary failure: a batch system
    # can requeue on it. SIGPIPE stands for a closed stdout, which print0 notices.
    STATUS = {"SIGTERM": 0, "SIGUSR1": 75, "SIGINT": 130, "SIGHUP": 129, "SIGPIPE": 141}
    # class attributes, because signal handlers are per process, too
    active = False
    received = None
    since = 0.0  # time.monotonic() of the first stop request

    @classmethod
    def request(cls, name):
        """Notes a stop request; returns whether it is the first."""
        if cls.received is not None:
            return False
        cls.since = time.monotonic()
        cls.received = name
        return True

    def __enter__(self):
        StopSignals.active = True
        StopSignals.received = None
        # Python runs signal handlers between two bytecodes of the main thread, which may be inside
        # a long operation. The wakeup file descriptor is written at once, and a thread reads it.
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.old_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.old_handlers = {}
        for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
            if not hasattr(signal, name):  # on Windows
                continue
            number = getattr(signal, name)
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            self.old_handlers[number] = signal.signal(number, lambda *_: None)
        self.thread = threading.Thread(target=self._listen, daemon=True, name="StopSignals")
        self.thread.start()
        return self

    def __exit__(self, *_):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.old_fd)
        self.writer.close()          # ends the thread
        self.thread.join(timeout=5)  # or it could note its last signal for the next context
        StopSignals.active = False
        StopSignals.received = None

    def _listen(self):
        while byte := self.reader.recv(1):
            if byte[0] not in self.old_handlers:
                continue
            name = signal.Signals(byte[0]).name
            if StopSignals.request(name):
                hint = "; Ctrl-C again stops at once" if name == "SIGINT" else ""
                print0(f"{name}: stop requested; finishing the step, then saving{hint}")
            # the terminal sends Ctrl-C to every process and torchrun forwards it: one within half
            # a second is a duplicate
            elif name == "SIGINT" and time.monotonic() - StopSignals.since > 0.5:
                os._exit(130)
        self.reader.close()
