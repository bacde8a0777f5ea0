"""
The command line that all scripts share: printing, flags, exit statuses, signals.

    from run.cli import run_main, start
    if __name__ == "__main__":
        start(parse_args)             # above the slow imports: --help and an invalid flag end the process here;
    import torch                      # main() parses the flags again, whether the file is run or imported
    ...
    if __name__ == "__main__":
        run_main(main)                # main() with one-line errors and exit statuses

PyTorch takes more than a second to import; this file must not import it, nor anything else that is slow.
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
import signal
import socket
import sys
import threading
import time
import traceback

# -----------------------------------------------------------------------------
# a script: printing, flags, exit statuses

def is_rank0():
    """Whether this process prints: rank 0 of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print0(*args, **kwargs):
    """print on rank 0 only, flushed. While training, a stdout that is closed or full is a stop request instead of an error."""
    if is_rank0():
        try:
            print(*args, **kwargs, flush=True)
        except OSError as e:
            discard_stdout()
            if not StopSignals.active:
                raise
            if not StopSignals.received:
                StopSignals.since, StopSignals.received = time.monotonic(), "SIGPIPE"
                print_error(f"stdout cannot be written ({e.strerror}): stop requested; finishing the step, then saving")


def print_error(*args):
    """print on stderr, if there is one: it is gone after its terminal was closed."""
    with contextlib.suppress(OSError):
        print(*args, file=sys.stderr, flush=True)


def discard_stdout():
    """Discards what is printed from now on: stdout is closed, and each flush would fail again, the one at exit too."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def duration(seconds):
    """A duration in its largest unit: 4000 -> "1.1 h"."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def report_progress(label):
    """A function of the fraction done that prints "label: 25%, 3.0 min left", rarely: after 5 s, then every 5 s or 10% more."""
    start = last = time.monotonic()

    def report(fraction):
        nonlocal last
        now = time.monotonic()
        if now - last >= max(5, (now - start) / 10) and 0 < fraction < 1:
            last = now
            print0(f"{label}: {fraction:.0%}, {duration((now - start) * (1 / fraction - 1))} left")
    return report


# flags of nanoGPT, build-nanogpt and transformers, and what they are called here
SYNONYMS = {"start": "prompt", "out-dir": "log-dir", "dataset": "data", "max-iters": "max-steps", "lr-decay-iters": "max-steps",
            "learning-rate": "lr", "min-lr": "min-lr-ratio", "eval-interval": "val-every", "eval-iters": "val-tokens",
            "gradient-accumulation-steps": "total-batch-size", "warmup-iters": "warmup-steps", "wandb-log": "tracker",
            "run-name": "exp-name", "tokens": "max-new-tokens", "length": "max-new-tokens", "max-length": "max-new-tokens",
            "nsamples": "num-samples", "wandb-run-name": "exp-name", "wandb-project": "tracker", "num-train-epochs": "epochs",
            "per-device-train-batch-size": "batch-size", "output-dir": "log-dir", "model-name-or-path": "init-from",
            "lr-scheduler-type": "schedule", "gradient-checkpointing": "activation-checkpointing", "save-steps": "save-every",
            "eval-steps": "val-every", "max-grad-norm": "grad-clip", "eval": "eval-only", "eval-every": "val-every"}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but an invalid flag raises ValueError: one line, without the usage text before it.

    --max_steps is --max-steps; an unknown flag gets the most similar one as a suggestion.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        return self._suggest(*super().parse_known_args(self._with_hyphens(args), namespace))

    def parse_known_intermixed_args(self, args=None, namespace=None):
        """As parse_known_args, which Python 3.12.8, 3.13.1 and later no longer call from here."""
        return self._suggest(*super().parse_known_intermixed_args(self._with_hyphens(args), namespace))

    @staticmethod
    def _with_hyphens(args):
        return [re.sub(r"^--\w[\w-]*", lambda name: name[0].replace("_", "-"), arg)
                for arg in (sys.argv[1:] if args is None else args)]

    def _suggest(self, namespace, unknown):
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for name in (arg.partition("=")[0] for arg in unknown if arg.startswith("--")):
            similar = [f"--{SYNONYMS.get(name[2:])}"] + [flag for flag in flags if flag.startswith(name)]
            similar += difflib.get_close_matches(name, flags, cutoff=0.75)
            if similar := [flag for flag in similar if flag in flags]:
                self.error(f"unknown flag {name}: did you mean {similar[0]}?")
        return namespace, unknown

    def error(self, message):
        message = re.sub(r"^argument (--[\w-]+):", r"\1", message)
        raise ValueError(f"{message}; --help lists what is allowed")


def integer(value):
    """The int of a text such as "5000000", "5e6", "5M"; K, M and B are thousands, millions and billions. Others: int(value)."""
    match = isinstance(value, str) and re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e\+?\d{1,2})?)([KMB]?)", value.strip(), re.I)
    if not match:
        return int(value)
    result = decimal.Decimal(match[1]) * 10 ** (3 * " KMB".index(match[2].upper() or " "))
    if result != result.to_integral_value():
        raise ValueError(f"{value} is not an integer")
    return int(result)


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """The type of a flag (argparse's type=) whose value is an int or a float, low <= value <= high and value > above.

    An int may be written as 5e9 or 5B. NaN and infinity are refused, and integers that do not fit into 64 bits.
    ArgumentTypeError names what is allowed.
    Example: number(float, above=0, high=1)("0") raises "0: must be a number, above 0 and at most 1".
    """
    limits = [f"above {above:g}"] * (above > -math.inf) + [f"{low:g} or more"] * (low > -math.inf)
    limits += [f"at most {high:g}"] * (high < math.inf)
    allowed = ("an integer" if kind is int else "a number") + ", " * bool(limits) + " and ".join(limits)

    def parse(value):
        try:
            result = integer(value) if kind is int else kind(value)
            valid = low <= result <= high and above < result and abs(result) < (2**63 if kind is int else math.inf)
        except (ValueError, OverflowError, TypeError, decimal.DecimalException):
            valid = False
        if not valid or not isinstance(value, str) and result != value:  # a float for an int, from a file
            raise argparse.ArgumentTypeError(f"{str(value)[:40]}: must be {allowed}")
        return result
    return parse


def printable(text):
    """text without control characters, which could come from a file and change the terminal: "\x1b[31m" -> r"\x1b[31m"."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_line(error):
    """An exception's type and the first line of its message."""
    return printable(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}")


def start(parse_args):
    """What a script does before its slow imports: Ctrl-C, OpenMP, --help, and an invalid flag."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C during the imports, which take seconds, ends the process without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin for milliseconds at the end of each operation before they sleep. If other processes use the
        # cores too, a spinning thread takes the core of one that still works: steps took 3 to 4 times as long. 3000 rounds
        # take about 10 us, which costs nothing. torch reads the variable when it is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    run_and_report(parse_args)


def run_main(main):
    """Runs a script's main(): a user error is one line and status 2, Ctrl-C status 130; a bug keeps its traceback.

    Under torchrun the process exits without interpreter shutdown: gloo's threads may still need the interpreter then,
    which would abort the process.
    """
    status = 1  # for an exception that is not caught below: a bug
    if "RANK" in os.environ:
        atexit.register(lambda: exit_now(status))  # registered first, so it runs last
    sigint = signal.getsignal(signal.SIGINT)
    try:
        if sigint is signal.SIG_DFL:  # set by the script before its imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run_and_report(main)
        status = 0
    except SystemExit as e:
        status = e.code or 0
        raise
    finally:
        if sigint is signal.SIG_DFL:  # Ctrl-C during interpreter shutdown would print a traceback
            signal.signal(signal.SIGINT, sigint)


def exit_now(status):
    """Ends the process without interpreter shutdown, after flushing what it printed."""
    with contextlib.suppress(OSError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def run_and_report(main):
    """Runs main(); prints expected errors and turns them into exit statuses."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal cannot encode
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
        wait_for_the_first_error(e)
        report_to_torchrun(f"error: {message}" if message else traceback.format_exc())
        if message is None:
            raise
        fail(message)


def message_of(error):
    """The one line of an expected error; None for a bug."""
    if isinstance(error, (ValueError, OSError)):  # FileNotFoundError and a full disk are OSErrors
        return str(error)
    if is_lost_connection(error):
        return f"rank {os.environ['RANK']} lost the connection to another rank: see what that one printed ({first_line(error)})"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}"
    if isinstance(error, RuntimeError):
        import torch  # imported already, where its errors occur
        if isinstance(error, torch.OutOfMemoryError):
            return f"out of GPU memory; use a smaller --batch-size ({str(error).splitlines()[0][:120]})"
        if "can't allocate memory" in str(error):  # of its CPU allocator
            return f"out of memory: {error}"
    return None


def is_lost_connection(error):
    """Whether a collective failed because another rank has ended: NCCL raises DistError, gloo RuntimeError."""
    if "RANK" not in os.environ or not isinstance(error, RuntimeError):
        return False
    import torch.distributed  # imported already, where its errors occur
    lost = "Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|Timed out waiting"
    return isinstance(error, torch.distributed.DistError) or bool(re.search(lost, str(error)))


def wait_for_the_first_error(error):
    """Under torchrun, gives the rank that has the cause of an error the time to print it first.

    Most errors occur on every rank: rank 0 prints them. When it ends, torchrun ends the others, which are waiting here.
    """
    if "RANK" not in os.environ:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's
    if is_lost_connection(error):
        time.sleep(10)
    elif not is_rank0():
        time.sleep(3)


def report_to_torchrun(text):
    """Writes an error into the file from which torchrun takes it for its summary, if torchrun started this process."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as f:
            extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": text, "extraInfo": extra}}, f)


def fail(error):
    """Prints an error as one line on stderr and exits with status 2."""
    print_error("error:", printable(" ".join(str(error).split("\n"))))
    sys.exit(2)


# -----------------------------------------------------------------------------
# signals

class StopSignals:
    """Context in which signals, and a closed stdout, only note a stop request: training saves before it ends.

    The signals are SIGTERM, SIGUSR1, Ctrl-C, and SIGHUP, which a closed terminal sends, unless it is ignored (nohup).

    `StopSignals.received` is the name of the first signal, or None; parallel.stop_requested agrees on it across ranks.
    Ctrl-C after a stop request ends the process at once, even inside a collective that hangs.
    """
    # Exit status after a stop. 75 is EX_TEMPFAIL of sysexits.h, a temporary failure: a batch system can requeue on it.
    # SIGPIPE stands for a closed stdout, which print0 notices; Python ignores the signal.
    STATUS = {"SIGTERM": 0, "SIGUSR1": 75, "SIGINT": 130, "SIGHUP": 129, "SIGPIPE": 141}
    received, active = None, False  # class attributes: signal handlers are per process, too
    since = 0.0                     # time.monotonic() of the first stop request

    def __enter__(self):
        # Python runs signal handlers between two bytecodes of the main thread, which may be inside a long operation.
        # The wakeup file descriptor is written at once, and a thread reads it.
        StopSignals.received, StopSignals.active = None, True
        numbers = {getattr(signal, name): name for name in self.STATUS if hasattr(signal, name)  # Windows has no SIGUSR1
                   and name != "SIGPIPE" and (name != "SIGHUP" or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)}
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.old_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.old_handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self.thread = threading.Thread(target=self._listen, args=(numbers,), daemon=True, name="StopSignals")
        self.thread.start()
        return self

    def __exit__(self, *_):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.old_fd)
        self.writer.close()          # ends the thread
        self.thread.join(timeout=5)  # or it could note its last signal for the next context
        StopSignals.received, StopSignals.active = None, False

    def _listen(self, numbers):
        while byte := self.reader.recv(1):
            name = numbers.get(byte[0])
            # the terminal sends Ctrl-C to every process and torchrun forwards it: one within half a second is a duplicate
            if name == "SIGINT" and StopSignals.received and time.monotonic() - StopSignals.since > 0.5:
                os._exit(130)
            if name and not StopSignals.received:
                StopSignals.since, StopSignals.received = time.monotonic(), name
                print0(f"{name}: stop requested; finishing the step, then saving"
                       + "; Ctrl-C again stops at once" * (name == "SIGINT"))
        self.reader.close()
