"""A command ends with one sentence, the right exit code, and options named as options."""

import errno
import signal
import subprocess
import sys

import pytest

from imagefeed.dataset.errors import ArgumentError, UserError

ENDINGS = {
    "raise UserError('/data: 3 are bad; raise `max_rejected`')": (1, "Error: /data: 3 are bad; raise --max-rejected\n"),
    "raise UserError('leave out `lrn=False` or give `tensorboard=True`')": (
        1,
        "Error: leave out --no-lrn or give --tensorboard\n",
    ),
    "raise ArgumentError('`size` is 3; choose 16 to 4096')": (2, "Error: --size is 3; choose 16 to 4096\n"),
    f"raise OSError({errno.ENOSPC}, '', '/data')": (
        1,
        "Error: /data: the disk is full; free some space and run the same command again to continue\n",
    ),
    f"raise OSError({errno.EIO}, '', '/data/x.jpg')": (
        1,
        "Error: /data/x.jpg: reading or writing it failed (input/output error); check the disk or the mount, then run the same "
        "command again to continue\n",
    ),
    f"raise OSError({errno.ENOLCK}, 'No locks available')": (
        1,
        "Error: output: no locks available; fix that, then run the same command again\n",
    ),
    "raise MemoryError": (1, "Error: out of memory; free some, or use fewer --workers, and run the same command again\n"),
    "raise KeyboardInterrupt": (130, "interrupted; run the same command again to continue\n"),
    f"os.kill(os.getpid(), {signal.SIGTERM:d}); time.sleep(9)": (
        143,
        "ended by SIGTERM; run the same command again to continue\n",
    ),
    "raise BrokenPipeError": (1, ""),
    "pass": (0, ""),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_command_ends_with_one_sentence_and_its_exit_code(ending):
    code = f"import os, time\nfrom imagefeed.dataset.errors import *\nwith one_sentence(): {ending}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == ENDINGS[ending]


def test_python_callers_see_the_names_of_arguments():
    assert str(UserError("raise `max_rejected`, not `x` or `a path`")) == "raise max_rejected, not x or `a path`"
    assert isinstance(ArgumentError("no"), UserError)
