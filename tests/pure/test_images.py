"""The images' files parse, and their pins are those that are tested elsewhere. Nothing is built."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "launchers" / "images"
REQUIREMENTS = ROOT / "tools" / "requirements"
CONTAINERFILES = [*sorted(IMAGES.glob("*.Containerfile")), ROOT / "sandbox" / "Containerfile"]
DEFINITIONS = [*sorted(IMAGES.glob("*.def")), ROOT / "sandbox" / "sandbox.def"]
INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD", "LABEL"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of every line; comments may stand between continued lines."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in whole.splitlines()) if word]


def arguments(path: Path) -> dict[str, str]:
    return dict(rest.strip().partition("=")[::2] for word, rest in instructions(path) if word == "ARG")


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.name)
def test_a_containerfile_parses(path: Path):
    found = instructions(path)
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert next(word for word, _ in found if word != "ARG") == "FROM"
    known = set(arguments(path))
    for word, rest in found:
        if word in ("FROM", "COPY", "ENV"):
            assert set(re.findall(r"\$\{(\w+)\}", rest)) <= known
        if word == "RUN":
            shell = subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True, check=False)
            assert shell.returncode == 0, shell.stderr
            assert set(re.findall(r"\$\{(\w+)\}", rest)) <= known
        if word == "FROM" and "AS" not in rest.split():
            assert len(rest.split()) == 1


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.Containerfile")), ids=lambda path: path.name)
def test_what_is_copied_lies_in_the_context(path: Path):
    copies = [shlex.split(rest) for word, rest in instructions(path) if word == "COPY"]
    local = [words[:-1] for words in copies if not words[0].startswith("--from")]
    assert local
    assert all((REQUIREMENTS / name).is_file() for names in local for name in names)


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.name)
def test_a_definition_takes_the_archive_of_its_containerfile(path: Path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    header = dict(line.split(": ", 1) for line in lines if re.match(r"\w+: ", line))
    assert header == {"Bootstrap": "oci-archive", "From": f"{path.stem}.oci.tar"}
    sections = {line for line in lines if line.startswith("%")}
    assert sections <= {"%environment", "%runscript", "%test", "%post", "%files", "%labels"}


def test_the_server_has_the_sglang_that_is_tested():
    pins = dict(line.split("==") for line in (REQUIREMENTS / "server.no-deps.txt").read_text().splitlines() if line)
    assert arguments(IMAGES / "server.Containerfile")["SGLANG_IMAGE"].endswith(f":v{pins['sglang']}")
    assert f"sglang=={pins['sglang']}" in (IMAGES / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["server"] == [f"sglang=={pins['sglang']}"]


def test_the_trainer_has_the_pins_that_are_tested():
    recipe = IMAGES / "trainer.Containerfile"
    runs = [rest for word, rest in instructions(recipe) if word == "RUN"]
    installed = next(rest for rest in runs if "trainer.txt" in rest)
    assert "-c /usr/local/share/requirements/trainer.constraints.txt" in installed
    constraints = dict(
        line.split(";")[0].strip().split("==")
        for line in (REQUIREMENTS / "trainer.constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    requirements = [
        Requirement(line) for line in (REQUIREMENTS / "trainer.txt").read_text().splitlines() if line and line[0] != "#"
    ]
    python = re.search(r"python:([\d.]+)-", arguments(recipe)["PYTHON_IMAGE"])
    assert python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{python[1]}.9" in SpecifierSet(project["requires-python"])
    core = [
        one
        for one in requirements
        if one.name == "megatron-core" and one.marker and one.marker.evaluate({"python_version": python[1]})
    ]
    (megatron,) = core
    assert constraints["torch"] in next(one for one in requirements if one.name == "torch").specifier
    if metadata.version("megatron-core") not in megatron.specifier:
        pytest.skip(f"this environment has another megatron-core than the image: {metadata.version('megatron-core')}")
    asked = [
        Requirement(line) for line in metadata.requires("megatron-core") or [] if line.startswith("transformer-engine")
    ]
    (engine,) = asked
    assert arguments(recipe)["TRANSFORMER_ENGINE"] in engine.specifier
    extras = ",".join(sorted(engine.extras))
    assert any(f"transformer-engine[{extras}]" in rest for rest in runs)


def test_the_page_names_the_same_versions():
    page, given = (IMAGES / "README.md").read_text(), arguments(IMAGES / "trainer.Containerfile")
    assert f"=={given['TRANSFORMER_ENGINE']}" in page
    assert given["APEX_COMMIT"] in page
    assert len(given["APEX_COMMIT"]) == 40


@pytest.mark.parametrize(("words", "code", "text"), [
    (["--help"], 0, "launchers/images/build trainer|server OUTPUT_DIR"), (["expert", "out"], 2, "no image expert"),
    (["trainer"], 2, "where to?"),
], ids=str)  # fmt: skip
def test_the_build_script_says_what_it_takes(words: list[str], code: int, text: str, tmp_path: Path):
    done = subprocess.run([IMAGES / "build", *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert text in done.stdout + done.stderr
