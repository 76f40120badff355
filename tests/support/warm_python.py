"""An executable in the place of `sys.executable` whose programs start with libraries imported.

A process of Python that imports torch, transformers, bitsandbytes and PEFT takes seconds before its
first line. Here one process imports them and forks for each program; what is started is a small
client that hands it the program's arguments, folder, environment, standard streams and, while it
runs, signals. A program is the same otherwise: its own modules, also this package's, are imported
by itself, and Pythons that it starts are started in the same way.

Not for what reads the environment when a library is imported, or is measured by its process id.
Run as a script, this file is the process that forks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -ISE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
answers = server.makefile("rb")
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline() or b"1")
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def warm_python() -> str:
    """The path of the executable; the process behind it lives as long as this one."""
    folder = tempfile.TemporaryDirectory(prefix="warm")
    client, address = Path(folder.name, "python"), str(Path(folder.name, "socket"))
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, address, str(client)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert server.stdout
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    return str(client)


def serve(address: str, client: str) -> None:
    """Fork for each client, until the standard input ends."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.integrations.bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    sys.executable = client
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    waited = selectors.DefaultSelector()
    waited.register(listener, selectors.EVENT_READ)
    waited.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in waited.select():
            if key.fd == 0:
                os._exit(0)
            if key.fileobj is listener:
                _start(listener, waited)
                continue
            pid, ended, connection = key.data
            if key.fd != ended:  # the client was killed
                os.kill(pid, signal.SIGKILL)
                waited.unregister(connection)
                continue
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            waited.unregister(ended)
            os.close(ended)
            with contextlib.suppress(OSError):
                connection.send(b"%d\n" % code)
            with contextlib.suppress(KeyError):
                waited.unregister(connection)
            connection.close()


def _start(listener: socket.socket, waited: selectors.BaseSelector) -> None:
    connection, _ = listener.accept()
    size, streams, *_ = socket.recv_fds(connection, 8, 3)
    request, whole = b"", int.from_bytes(size, "big")
    while len(request) < whole:
        request += connection.recv(whole - len(request))
    pid = os.fork()
    if not pid:
        for key in waited.get_map().values():
            if key.fd > 2:
                os.close(key.fd)
        connection.detach()
        _run(streams, *json.loads(request))
    for stream in streams:
        os.close(stream)
    connection.send(b"%d\n" % pid)
    ended = os.pidfd_open(pid)
    waited.register(ended, selectors.EVENT_READ, (pid, ended, connection))
    waited.register(connection, selectors.EVENT_READ, (pid, ended, connection))


def _run(streams: list[int], arguments: list[str], folder: str, variables: dict[str, str]) -> Any:
    """Be the program, to its end."""
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    code = 1
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        given = variables.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[1:1] = [path for path in given if path and path not in sys.path]
        _program(arguments)
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        else:
            code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _program(arguments: list[str]) -> None:
    """What Python does with its arguments: `-c CODE`, `-m MODULE` or a script."""
    what, *rest = arguments
    if what == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(code, {"__name__": "__main__"})
    elif what == "-m":
        name, *rest = rest
        sys.argv, sys.path[0] = [name, *rest], ""
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [what, *rest], str(Path(what).resolve().parent)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    serve(*sys.argv[1:])
