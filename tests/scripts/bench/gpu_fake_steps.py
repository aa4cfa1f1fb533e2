"""Steps for the tests of gpu.py's runner: one that works, one that fails, one that hangs and has started a child."""

import subprocess
import sys
from pathlib import Path

from gpu import Options, row


def works(options: Options):
    yield row("rate", 2.0, "TB/s", at_least=1)
    yield row("memory", 3.0, "GB", at_most=1)
    yield row("device", options.device)


def fails(options: Options):
    yield row("before", 1)
    raise RuntimeError("the | driver is gone")


def hangs(options: Options):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(options.folder, "child").write_text(str(child.pid))
    yield row("so far", 7)
    child.wait()


def dies(options: Options):
    import os
    import signal

    yield row("alive", 1)
    os.kill(os.getpid(), signal.SIGKILL)
