from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import megatron_distil
from megatron_distil import load_config


def test_the_public_names_are_these():
    assert megatron_distil.__all__ == [
        "Config",
        "ConfigError",
        "DistilError",
        "evaluate",
        "load_config",
        "sft",
        "train",
    ]


def test_the_signature_of_load_config_is_this():
    assert str(inspect.signature(load_config)) == "(recipe: 'str | Path', overrides: 'Sequence[str]' = ()) -> 'Config'"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = megatron_distil.trian


@pytest.mark.parametrize(
    "code",
    [
        "import megatron_distil",
        "from megatron_distil import load_config; load_config('two_roads')",
        "import megatron_distil.cli",
        "import megatron_distil.sizing, megatron_distil.metrics.log, megatron_distil.metrics.sinks, megatron_distil.evals",
        "import megatron_distil.report",
        "from megatron_distil.cli import app; app(['check', 'two_roads'], standalone_mode=False)",
    ],
)
def test_no_torch_is_needed_to_read_a_configuration(code: str):
    # A fresh interpreter: this one may have torch already.
    probe = f"import sys\n{code}\nheavy = {{'torch', 'megatron', 'transformers', 'sglang'}} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
