"""Programs that are not Python: compiled once, judged by the same rules, behind the same walls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from sandbox import feedback, interpreter, judge, languages, limits, probe
from sandbox.executor import Task, Worker
from tests.sandbox_service import descendants

AVAILABLE = languages.available(probe.probe().level)
LIMITS = limits.complete({"cpu_s": 4.0, "idle_s": 8.0})
needs_cpp = pytest.mark.skipif(bool(AVAILABLE["cpp"]), reason=f"C++: {AVAILABLE['cpp']}")
needs_node = pytest.mark.skipif(bool(AVAILABLE["javascript"]), reason=f"JavaScript: {AVAILABLE['javascript']}")

PLUS_ONE = '#include <cstdio>\nint main() { int a; scanf("%d", &a); printf("%d\\n", a + 1); }\n'
# Light headers: a compiler is slow on a busy machine.
CPP = {
    "adds": (PLUS_ONE, "passed"),
    "is wrong": ("int main() {}", "wrong_answer"),
    "ends with 3": ("int main() { return 3; }", "runtime_error"),
    "divides by zero": ("int main(int n, char**) { volatile int zero = n - 1; return n / zero; }", "runtime_error"),
    "follows null": ("int main() { *(volatile int*)0 = 1; }", "runtime_error"),
    "aborts": ('#include <cstdlib>\n#include <cstdio>\nint main() { puts("2"); abort(); }', "runtime_error"),
    "loops": ("int main() { for (volatile int i = 0;; i++); }", "time_limit"),
    "takes 2 GiB": (
        "#include <new>\n#include <cstring>\nint main() { for (;;) memset(new char[1 << 24], 1, 1 << 24); }",
        "memory_limit",
    ),
    "floods": (
        '#include <cstdio>\nint main() { for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"); }',
        "output_limit",
    ),
}
JAVASCRIPT = {
    "adds": ("console.log(parseInt(require('fs').readFileSync(0, 'utf8')) + 1)", "passed"),
    "throws": ("console.log(2); throw new Error('no')", "runtime_error"),
    "is no program": ("function (", "runtime_error"),
    "loops": ("for (;;);", "time_limit"),
    "takes 2 GiB": ("const all = []; for (;;) all.push(new Array(1e6).fill(1))", "memory_limit"),
}
RAW = """
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <initializer_list>
int main() {
    struct { const char* name; long number; } calls[] = {
        {"socket", SYS_socket}, {"ptrace", SYS_ptrace}, {"mount", SYS_mount}, {"unshare", SYS_unshare},
        {"bpf", SYS_bpf}, {"io_uring_setup", SYS_io_uring_setup}, {"memfd_create", SYS_memfd_create},
        {"keyctl", SYS_keyctl}, {"setuid", SYS_setuid}, {"process_vm_readv", SYS_process_vm_readv},
    };
    for (auto& call : calls)
        if (syscall(call.number, 2, 1, 0, 0, 0) >= 0) printf("BREACH %s\\n", call.name);
    for (const char* path : {"/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/1/environ"})
        if (open(path, O_RDONLY) >= 0) printf("BREACH read %s\\n", path);
    for (const char* path : {"/x", "/usr/x", "/dev/x", "/lib/x", "/usr/bin/x"})
        if (open(path, O_WRONLY | O_CREAT, 0600) >= 0) printf("BREACH write %s\\n", path);
    signal(SIGXFSZ, SIG_IGN);
    int own = open("/tmp/x", O_WRONLY | O_CREAT, 0600);
    long written = 0; char block[65536]; memset(block, 1, sizeof block);
    for (int i = 0; i < 1024; i++) { long n = write(own, block, sizeof block); if (n > 0) written += n; }
    if (written > 32 << 20) printf("BREACH disk\\n");
    for (int fd = 3; fd < 64; fd++) if (fd != own && fcntl(fd, F_GETFD) >= 0) printf("BREACH descriptor %d\\n", fd);
    int made = 0;
    for (int i = 0; i < 200; i++) { int pid = fork(); if (pid == 0) { sleep(20); _exit(0); } made += pid > 0; }
    if (made) printf("BREACH %d processes\\n", made);
    printf("done\\n");
}
"""


def run_all(language: str, programs: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, judge.Record]]:
    async def run() -> dict[str, tuple[str, judge.Record]]:
        found: dict[str, tuple[str, judge.Record]] = {}
        async with await Worker.start(languages.LOWEST_LEVEL, interpreter.find()) as worker:
            for name, (code, verdict) in programs.items():
                limited = {**LIMITS, "cpu_s": 0.5} if verdict == "time_limit" else LIMITS
                record = await worker.run(Task(code=code, input="1\n", language=language, limits=limited))
                found[name] = judge.judge(record, "stdin", "2", limited).verdict, record
        return found

    return asyncio.run(run())


@needs_cpp
def test_cpp_programs_are_judged_by_the_same_rules() -> None:
    found = run_all("cpp", CPP)
    assert {name: verdict for name, (verdict, _) in found.items()} == {
        name: verdict for name, (_, verdict) in CPP.items()
    }
    ends = {name: found[name][1].exit for name in ("aborts", "divides by zero", "follows null", "ends with 3")}
    assert ends == {"aborts": -6, "divides by zero": -8, "follows null": -11, "ends with 3": 3}


@needs_node
def test_javascript_programs_are_judged_by_the_same_rules() -> None:
    found = run_all("javascript", JAVASCRIPT)
    wanted = {name: verdict for name, (_, verdict) in JAVASCRIPT.items()}
    assert {name: verdict for name, (verdict, _) in found.items()} == wanted


@needs_cpp
def test_a_program_that_does_not_compile_is_explained_by_the_compiler_and_reads_nothing() -> None:
    programs = {
        "unknown name": ("int main() { return x; }", "compile_error"),
        "host file": ('int main() {}\n#include "/etc/passwd"\n', "compile_error"),
        "environment": ('int main() {}\nasm(".incbin \\"/proc/self/environ\\"");\n', "compile_error"),
        "no end": ("template <int n> struct A { A<n + 1> a; };\nA<0> a;\nint main() {}", "compile_error"),
    }
    found = run_all("cpp", programs)
    assert {name: verdict for name, (verdict, _) in found.items()} == dict.fromkeys(programs, "compile_error")
    record = found["unknown name"][1]
    said = judge.judge(record, "stdin", "2", LIMITS)
    assert "was not declared" in said.why
    shown = feedback.Shown(1, said.verdict, said.why, "1\n", "2", "", record.stderr.decode(), None)
    assert "main.cpp:1:21: error:" in feedback.render([shown])
    assert record.cpu_s == 0


@needs_cpp
def test_raw_system_calls_of_a_compiled_program_get_nothing() -> None:
    (_, record) = run_all("cpp", {"raw": (RAW, "wrong_answer")})["raw"]
    assert (record.stdout, record.exit) == (b"done\n", 0), record.stderr


@needs_cpp
def test_the_compiler_runs_once_for_all_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    send: Any = Worker._send

    async def counted(worker: Worker, task: Task, stage: Any = "run") -> judge.Record:
        stages.append(stage)
        return await send(worker, task, stage)

    monkeypatch.setattr(Worker, "_send", counted)

    async def run() -> list[str]:
        async with await Worker.start(languages.LOWEST_LEVEL, interpreter.find()) as worker:
            codes = (PLUS_ONE, PLUS_ONE, PLUS_ONE + "\n", "int main() { return x; }", "int main() { return x; }")
            records = [await worker.run(Task(code=code, input="1\n", language="cpp", limits=LIMITS)) for code in codes]
            assert len(descendants(worker.process.pid)) == 2  # the inner zygote and its keeper
        return [judge.judge(record, "stdin", "2", LIMITS).verdict for record in records]

    assert asyncio.run(run()) == ["passed", "passed", "passed", "compile_error", "compile_error"]
    assert stages == ["compile", "run", "run", "compile", "run", "compile"]


def test_a_language_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert languages.available(1)["cpp"] == "needs isolation level 2, and this is level 1"
    monkeypatch.setattr(languages.os, "access", lambda *_: False)
    assert languages.available() == {
        "python": "",
        "cpp": "/usr/bin/g++ is not there",
        "javascript": "/usr/bin/node is not there",
    }
