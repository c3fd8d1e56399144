"""The one exception for what the user can mend, and how a command ends on it."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator


class UserError(Exception):
    """The data, the machine or the run is at fault; the message is one sentence: what, where, what to do."""


def with_flags(message: str) -> str:
    """The message as a command says it: `crop_size` becomes --crop-size, and `cache=none` --cache none."""
    return re.sub(r"`(\w+)(=?)([^`\s]*)`", lambda m: f"--{m[1].replace('_', '-')}{' ' * len(m[2])}{m[3]}", message)


REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, it goes on where it stopped",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, it goes on",
    errno.EROFS: "the file system is read-only: choose another folder or mount it writable",
    errno.EACCES: "permission denied: change the rights of it or choose another path",
    errno.EPERM: "not permitted: change the rights of it or choose another path",
}


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with one sentence: exit code 1 on a UserError, an error of the system or short memory, 130 on Ctrl-C, 143
    on SIGTERM, as batch schedulers send it."""
    try:
        with _sigterm_raised():
            yield
    except UserError as error:
        message = with_flags(str(error))
    except BrokenPipeError:  # whoever read the output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        what = (error.strerror or str(error)).lower()
        remedy = REMEDIES.get(error.errno, f"{what}; mend that, then run the same command again")
        message = f"{error.filename or 'output'}: {remedy}"
    except MemoryError:
        message = "memory is used up: free some, or use fewer --workers, and run the same command again"
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except _Terminated:
        print("ended by SIGTERM; run the same command again to go on", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    else:
        return
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(1) from None


class _Terminated(BaseException):
    """As KeyboardInterrupt, for SIGTERM: what has to be closed is closed on the way."""


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Raises _Terminated on SIGTERM; left to whoever handles it already, or to the main thread where this is another."""

    def on_signal(*_):
        raise _Terminated

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
