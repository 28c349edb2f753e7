"""Fork server. Started with a clean environment as an unprivileged user; imports once, then forks keepers.

    service --control socket--> zygote --fork--> keeper (trusted) --fork--> child (untrusted)

Neither the zygote nor a keeper ever reads a payload, so a child cannot find another program's data in the memory that it
inherited, and nothing on this side ever sees an expected output: the service compares.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import site
import socket
import sys
from contextlib import suppress

from sandbox import keeper, linux, namespaces, wire

PRELOAD = """math cmath itertools functools operator statistics random collections heapq bisect array string re typing
json io fractions decimal dataclasses datetime copy threading traceback linecache faulthandler resource types atexit
queue enum abc""".split()  # noqa: SIM905 - a list of words
CHILD_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> None:
    """Serve until the control socket closes. Arguments: descriptor of the control socket, settings as JSON."""
    serve(socket.socket(fileno=int(sys.argv[1])), keeper.Settings(**json.loads(sys.argv[2])), keeper.Keeper)


def serve(control: socket.socket, settings: keeper.Settings, supervisor: type[keeper.Keeper]) -> None:
    """Fork a keeper of this kind for every socket that comes."""
    if settings.box is not None:
        wire.receive(control)  # sent when this process is in its control group
    del sys.path[0]  # the archive of these modules
    for name in PRELOAD:
        with suppress(ImportError):
            __import__(name)
    site.setquit()  # -S left out exit() and quit(), which programs use
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are reaped by the kernel
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # the new root has none
    uids = os.getresuid()
    pid_namespace = None
    if settings.has("namespaces.user"):
        pid_namespace = namespaces.enter(settings.read_only, proc, settings.without)
    if settings.has("environment"):
        os.environ.clear()  # noqa: TID251 - what programs see
    os.environ.update(CHILD_ENVIRONMENT, HOME=settings.workdir)  # noqa: TID251
    room = keeper.Room(settings=settings, proc=proc, pid_namespace=pid_namespace, filters=keeper.filters())
    gc.collect()
    gc.freeze()  # keep the shared pages shared
    gc.disable()
    wire.send(control, {"ready": os.getpid(), "uids": uids, "python": "{}.{}.{}".format(*sys.version_info[:3])})
    while True:
        try:
            message, fds = wire.receive(control)
        except InterruptedError:
            continue
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _keep(room, fds[0], supervisor)
        for fd in fds:
            os.close(fd)


def _keep(room: keeper.Room, fd: int, supervisor: type[keeper.Keeper]) -> None:
    """Be a keeper until its socket closes. Never returns."""
    status = 1
    try:
        service = socket.socket(fileno=fd)
        try:
            supervisor(room, service).serve()
            status = 0
        except BaseException as error:  # noqa: BLE001 - told to the service, which starts another keeper
            with suppress(OSError):
                wire.send(service, {"error": f"keeper: {error!r}"})
    finally:
        os._exit(status)
