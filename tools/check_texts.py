"""What no linter looks for: dead relative links, TODOs without a condition, names of machines and package indexes.

python tools/check_texts.py [FILE...]; without a file: all that git knows or does not ignore.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)!?\[[^\]]*\]\(([^)\s#]+)(?:#[^)]*)?\)")
TODO = re.compile(r"\b(TODO|FIXME|XXX)\b(.*)")
CONDITION = re.compile(r": .*\b(when|once|until|if|after|as soon as)\b")
# [.] and [/] keep this file from matching itself
BANNED = {
    "the host of a package index": re.compile(
        r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|pypi[.]nvidia[.]com"
    ),
    "a path of one machine": re.compile(r"(?<![\w.{}$/-])[/](root|home|work|opt)[/]\w"),
}
IMAGES = ("Containerfile", "sandbox.def")
"""Their paths are of the image that they make."""
MARKDOWN_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def problems(path: Path) -> Iterator[str]:
    """Everything that is wrong with a text file; nothing for a binary one."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if path.suffix == ".md":
        yield from _dead_links(path, text)
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{os.path.relpath(path, ROOT)}:{number}"
        if path.suffix in (".py", ".sh", ".toml") and (todo := TODO.search(line)) and _is_open(todo):
            yield f"{where}: {todo[1]} without a condition; write '# TODO: drop when ...'"
        for what, pattern in BANNED.items() if path.name not in IMAGES else ():
            if found := pattern.search(line):
                yield f"{where}: {what}: {found[0]}"


def _is_open(todo: re.Match[str]) -> bool:
    return todo[1] != "TODO" or not CONDITION.match(todo[2])


def _dead_links(path: Path, text: str) -> Iterator[str]:
    prose = MARKDOWN_CODE.sub(lambda code: "\n" * code[0].count("\n"), text)
    for link in LINK.finditer(prose):
        target = link[1]
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
            number = prose.count("\n", 0, link.start()) + 1
            yield f"{os.path.relpath(path, ROOT)}:{number}: link to {target}, which is not there"


def _files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def main(arguments: list[str]) -> int:
    """The command line; 1 when something was found."""
    files = [Path(word).resolve() for word in arguments] or _files()
    found = [problem for path in files if path != Path(__file__) for problem in problems(path)]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
