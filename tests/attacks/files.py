"""Files and sockets of the host."""

from __future__ import annotations

from tests.attacks.attack import Attacks
from tests.attacks.processes import LIBC

attack = ATTACKS = Attacks()
HIDDEN = "landlock namespaces.mount"
NO_SOCKET = "seccomp namespaces.net"

# --------------------------------------------------------------------------------------------- files
attack("read /etc/shadow", "runtime_error", "print('BREACH', open('/etc/shadow').read())", f"{HIDDEN} identity")
attack("read /etc/passwd", "runtime_error", "print('BREACH', open('/etc/passwd').read())", HIDDEN)
attack("read the answers file", "runtime_error", "print('BREACH', open('@SECRET@').read())", HIDDEN)
attack(
    "list the directory of the answers",
    "runtime_error",
    "import os\nprint('BREACH', os.listdir(os.path.dirname('@SECRET@')))",
    HIDDEN,
)
attack(
    "list the harness's own sources",
    "runtime_error",
    """
    import os, sys
    names = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "sandbox" and getattr(m, "__file__", None)]
    for name in [*names, "@SECRET@"]:
        try:
            print("BREACH", os.listdir(os.path.dirname(name)))
        except OSError as error:
            last = error
    raise last
""",
    HIDDEN,
)
attack(
    "secrets in the environment",
    "wrong_answer",
    "import os\nprint(dict(os.environ))",
    "environment",
)
attack(
    "secrets in the memory where the environment was",
    "wrong_answer",
    """
    import ctypes
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    for entry in environ:
        if entry is None:
            break
        print(entry)
""",
    "environment",
)
attack(
    "list /proc",
    "runtime_error",
    """
    import os
    pids = [n for n in os.listdir("/proc") if n.isdigit()]
    print("BREACH" if len(pids) > 2 else "own", pids)
    raise SystemExit(1)
""",
    HIDDEN,
)
attack("list /sys", "runtime_error", "import os\nprint('BREACH', os.listdir('/sys'))", HIDDEN)
attack("list /dev", "runtime_error", "import os\nprint('BREACH', os.listdir('/dev/pts'))", HIDDEN)
attack(
    "symlink out",
    "runtime_error",
    "import os\nos.symlink('@SECRET@', 'link')\nprint('BREACH', open('link').read())",
    HIDDEN,
)
attack(
    "hard link out",
    "runtime_error",
    "import os\nos.link('@VICTIM@', 'link')\nprint('BREACH', open('link').read())",
    HIDDEN,
)
attack("dot-dot out", "runtime_error", "print('BREACH', open('../' * 12 + '@SECRET@'.lstrip('/')).read())", HIDDEN)
attack(
    "through a descriptor of the root",
    "runtime_error",
    """
    import os
    root = os.open("/", os.O_PATH)
    fd = os.open("@SECRET@".lstrip("/"), os.O_RDONLY, dir_fd=root)
    print("BREACH", os.read(fd, 99))
""",
    HIDDEN,
)
attack(
    "stat a host path",
    "runtime_error",
    "import os\nprint('BREACH', os.stat('@SECRET@').st_size)",
    "namespaces.mount",
    level=2,
)
attack(
    "the host's name",
    "wrong_answer",
    "import os\nprint('BREACH' if os.uname().nodename == '@HOST@' else 'another')",
    "namespaces.uts",
    level=2,
)
attack("overwrite a host file", "runtime_error", "open('@VICTIM@', 'a').write('x')\nprint('BREACH')", HIDDEN)
attack(
    "truncate a host file by its path",
    "runtime_error",
    "import os\nos.truncate('@VICTIM@', 9)\nprint('BREACH')",
    f"seccomp {HIDDEN}",
)
attack(
    "move a host file",
    "runtime_error",
    "import os\nos.rename('@VICTIM@', '@VICTIM@.moved')\nos.rename('@VICTIM@.moved', '@VICTIM@')\nprint('BREACH')",
    HIDDEN,
)
attack("make a host file", "runtime_error", "open('@TRACE@', 'w').close()", HIDDEN)
attack("make a host folder", "runtime_error", "import os\nos.mkdir('@TRACE@')", HIDDEN)
attack("make a named pipe", "runtime_error", "import os\nos.mkfifo('@TRACE@')", f"seccomp {HIDDEN}")
attack(
    "mode of a host file",
    "runtime_error",
    "import os\nos.chmod('@VICTIM@', 0o666)\nprint('BREACH')",
    "seccomp namespaces.mount",
)
attack(
    "times of a host file",
    "runtime_error",
    "import os\nos.utime('@VICTIM@')\nprint('BREACH')",
    "seccomp namespaces.mount",
)
attack(
    "watch a host folder",
    "wrong_answer",
    LIBC
    + """
fd = libc.inotify_init1(0)
r = libc.inotify_add_watch(fd, os.path.dirname("@SECRET@").encode(), 0xFFF)
print("BREACH: watching" if r >= 0 else "refused")
""",
    "seccomp namespaces.mount",
)
attack("a terminal", "runtime_error", "import os\nos.openpty()\nprint('BREACH')", f"seccomp {HIDDEN}")
attack(
    "a file handle in place of a path",
    "wrong_answer",
    LIBC
    + """
handle = (ctypes.c_uint * 34)(128)
mount = ctypes.c_int()
r = syscall(303, 264, -100, b"/usr", handle, ctypes.byref(mount), 0)
print("BREACH: a handle" if r == 0 else "refused")
""",
    "seccomp",
)

# ------------------------------------------------------------------------------------------- network
attack(
    "socket: connect to loopback",
    "runtime_error",
    "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 2)\nprint('BREACH: connected')",
    f"{NO_SOCKET} landlock",
)
attack(
    "socket: listen on loopback",
    "runtime_error",
    "import socket\nsocket.socket().bind(('127.0.0.1', 0))\nprint('BREACH: bound')",
    "seccomp landlock",
)
attack(
    "socket: a datagram",
    "runtime_error",
    """
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @PORT@))
    print("BREACH: sent")
""",
    NO_SOCKET,
)
attack(
    "socket: over IPv6",
    "runtime_error",
    "import socket\nsocket.socket(socket.AF_INET6)\nprint('BREACH: a socket')",
    "seccomp",
)
attack(
    "socket: an abstract one of the host",
    "runtime_error",
    "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@')\nprint('BREACH: connected')",
    f"{NO_SOCKET} landlock",
)
attack(
    "socket: one of the host's file system",
    "runtime_error",
    "import socket\nsocket.socket(socket.AF_UNIX).connect('@UNIX@')\nprint('BREACH: connected')",
    "seccomp namespaces.mount",
)
attack(
    "socket: rare families",
    "wrong_answer",
    """
    import socket
    for family, kind in ((16, 3), (38, 5), (17, 3), (40, 1), (31, 3), (44, 3)):
        try:
            print("BREACH: family", socket.socket(family, kind))
        except OSError:
            pass
""",
    "seccomp",
)
attack(
    "socket: a pair of another family",
    "wrong_answer",
    LIBC
    + """
syscall(53, 199, 2, 1, 0, (ctypes.c_int * 2)())
print("refused" if ctypes.get_errno() == 1 else "BREACH: it reached the kernel")
""",
    "seccomp",
)
attack(
    "look a name up",
    "runtime_error",
    "import socket\nsocket.getaddrinfo('127.0.0.1', @PORT@)\nsocket.if_nameindex()\nprint('BREACH: interfaces')",
    "seccomp",
)
