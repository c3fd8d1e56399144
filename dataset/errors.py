"""UserError, for what the user can fix, and how a command ends on it."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

# As PyTorch, DALI and C++ call it, in messages of RuntimeErrors.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can(no|')t allocate|not enough memory|bad_alloc|cudaErrorMemoryAllocation", re.IGNORECASE
)
ARGUMENT = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")


class UserError(Exception):
    """The data, the machine or the run is at fault. The message is one sentence: what, where, what to do.

    An argument to change stands in backticks: `cache="none"` reads so in Python, and as --cache none from a command.
    """

    def __str__(self) -> str:
        return ARGUMENT.sub(lambda match: match[0].strip("`"), super().__str__())

    def of_command(self) -> str:
        """The message with options for arguments."""

        def flag(match: re.Match) -> str:
            name, value = match[1].replace("_", "-"), (match[2] or "").strip("\"'")
            if value in ("True", "False"):
                return f"--{name}" if value == "True" else f"--no-{name}"
            return f"--{name} {value}".rstrip()

        return ARGUMENT.sub(flag, super().__str__())


class ArgumentError(UserError):
    """An argument is at fault; a command ends with exit code 2, as for any wrong option."""


AGAIN = "run the same command again to continue"
CHECK_DISK = "check the disk or the mount"
REMEDIES = {
    errno.ENOSPC: f"the disk is full; free some space and {AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; free some space and {AGAIN}",
    errno.EIO: f"reading or writing it failed (input/output error); {CHECK_DISK}, then {AGAIN}",
    errno.EROFS: "the file system is read-only; choose another folder or mount it writable",
    errno.EACCES: "permission denied; change its permissions or choose another path",
    errno.EPERM: "not permitted; change its permissions or choose another path",
}


def reason_of(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


class _Terminated(BaseException):
    """Like KeyboardInterrupt, for SIGTERM: everything open is closed on the way out."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with one sentence and an exit code: 1 on a UserError, a system error or lack of memory, that of a GPU too,
    2 on an ArgumentError, 130 on Ctrl-C, 143 on SIGTERM, which batch schedulers send."""
    code = 1
    try:
        with _sigterm_raised():
            yield
        return
    except UserError as error:
        message = f"Error: {error.of_command()}"
        code = 2 if isinstance(error, ArgumentError) else 1
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, f"{reason_of(error)}; fix that, then run the same command again")
        message = f"Error: {error.filename or 'output'}: {remedy}"
    except MemoryError:
        message = "Error: out of memory; free some, or use fewer --workers, and run the same command again"
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        where = "the GPU's memory" if "CUDA" in str(error) else "memory"
        message = f"Error: out of {where}; lower --batch-size or --cache-bytes, or end other programs that use it"
    except KeyboardInterrupt:
        message, code = f"interrupted; {AGAIN}", 130
    except _Terminated:
        message, code = f"ended by SIGTERM; {AGAIN}", 128 + signal.SIGTERM
    print(message, file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Raises _Terminated on SIGTERM, in the main thread and unless something else handles the signal already."""

    def on_signal(*_: object) -> None:
        raise _Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
