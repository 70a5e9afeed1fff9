"""The command line in processes of its own, many of them in little time.

``gramian`` runs ``python -m gramian.cli.main``. ``Launcher`` is a process that has imported the libraries and forks for
every command, so that a command costs its own work and not five seconds of imports; the child is a process like any
other: it can be killed, it has its own streams, and nothing that it does outlives it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


class Result(NamedTuple):
    """Exit code (minus the signal's number if one ended it) and both streams."""

    code: int
    out: str
    err: str


def gramian(*arguments: object) -> Result:
    """Run ``gramian`` with `arguments` in a new interpreter."""
    command = [sys.executable, "-m", "gramian.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    return Result(done.returncode, done.stdout, done.stderr)


LOOP = """
import json, os, sys, traceback
import torch, transformers
import transformers.models.auto.modeling_auto, transformers.models.bert.modeling_bert
from transformers import AutoTokenizer, PreTrainedTokenizerFast
import gramian.cli.main, gramian.models.job, gramian.models.huggingface, gramian.models.sentence_encoder
import gramian.report.compress_page, gramian.report.terminal
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            for number, name in ((1, order["out"]), (2, order["err"])):
                handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, number)
            sys.argv = ["gramian", *order["arguments"]]
            exec(order["before"], {})
            gramian.cli.main.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


KILL = """
import os, signal
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def on_call(number, function, when="before"):
    calls = iter(range(1, 10**6))
    def wrapped(*args, **kwargs):
        here = next(calls) == number
        if here and when == "before":
            kill()
        result = function(*args, **kwargs)
        if here:
            kill()
        return result
    return wrapped
"""
"""What runs in a child before a command that is to kill itself: ``kill()``, and ``on_call(n, function)`` for one that does so
in its n-th call."""


class Launcher:
    """Runs commands one after another; close it at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self._answer() == "ready"

    def __call__(self, *arguments: object, before: str = "") -> Result:
        """Run ``gramian`` with `arguments`, after the Python code `before` has run in the same process."""
        out, err = self.folder / "out", self.folder / "err"
        order: dict[str, Any] = {
            "arguments": [str(a) for a in arguments],
            "before": before,
            "out": str(out),
            "err": str(err),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Result(int(self._answer()), out.read_text(), err.read_text())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@functools.cache
def launcher() -> Launcher:
    """The one launcher of this test session."""
    made = Launcher(Path(tempfile.mkdtemp()))
    atexit.register(made.close)
    return made


def listing(folder: Path) -> dict[str, bytes]:
    """Every file and folder under `folder`, hidden ones too, with what the files hold."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}
