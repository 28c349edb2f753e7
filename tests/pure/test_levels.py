import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"

PASSES = "def test_passes(): pass\n"
NEEDS_SLURM = 'import pytest\ndef test_drill(): pytest.skip("needs slurm: sbatch is not on the path")\n'
MODULE_NEEDS_SLURM = 'import pytest\npytest.skip("needs slurm: no sbatch", allow_module_level=True)\n'
CAMPAIGN = "import pytest\n@pytest.mark.full\ndef test_long(): pass\n"


@pytest.fixture
def levels(tmp_path):
    """Runs pytest on small levels of their own: levels(env, *arguments, pure=..., cluster=...)."""

    def run(*arguments: str, env: dict[str, str] | None = None, **sources: str) -> tuple[int, str]:
        tests = tmp_path / "tests"
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    full: x\n    gpu: x\n")
        for level, source in sources.items():
            (tests / level).mkdir(parents=True)
            (tests / level / f"test_{level}.py").write_text(source)
        shutil.copy(CONFTEST, tests / "conftest.py")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DISTIL_")}
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests", *arguments],
            cwd=tmp_path,
            env={**inherited, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return ended.returncode, ended.stdout

    return run


def test_each_level_is_counted_and_a_skip_is_told_with_its_reason(levels):
    code, text = levels(pure=PASSES, cluster=NEEDS_SLURM)
    assert code == 0
    assert "pure         1 ran, 0 skipped" in text
    assert "cluster      skipped: all 1" in text
    assert "1 x needs slurm: sbatch is not on the path" in text
    assert text.rstrip().splitlines()[-1].startswith("=")
    assert "1 passed, 1 skipped" in text.rstrip().splitlines()[-1]


def test_a_level_without_tests_fails(levels):
    code, text = levels(pure=PASSES, env={"DISTIL_LEVELS": "pure,e2e"})
    assert code == 5
    assert "e2e          FAILED: no test was collected" in text


def test_what_was_deselected_was_collected(levels):
    code, text = levels("-k", "passes", pure=PASSES, cluster=NEEDS_SLURM, env={"DISTIL_LEVELS": "pure,cluster"})
    assert code == 0
    assert "cluster      0 ran, 0 skipped" in text


@pytest.mark.parametrize("source", [NEEDS_SLURM, MODULE_NEEDS_SLURM])
def test_a_skip_for_want_of_what_was_promised_is_a_failure(levels, source):
    code, text = levels(pure=PASSES, cluster=source, env={"DISTIL_REQUIRE": "gpu,slurm"})
    assert code != 0
    assert "DISTIL_REQUIRE promises slurm, but the test skipped: needs slurm" in text


def test_campaigns_run_when_they_are_asked_for(levels):
    assert "1 x a long campaign: runs with --full" in levels(pure=CAMPAIGN)[1]


def test_campaigns_run_with_full(levels):
    assert "pure         1 ran, 0 skipped" in levels("--full", pure=CAMPAIGN)[1]
