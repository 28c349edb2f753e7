"""Checkpoints <-> Hugging Face's format, in one process: what tools/export and tools/import run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_distil.errors import DistilError


def main() -> int:
    options = _parser().parse_args()
    from megatron_distil.trainer.convert import export_checkpoint, import_model  # after the parser: it takes seconds

    try:
        if options.command == "export":
            export_checkpoint(options.checkpoint, options.hf_folder, model=options.model)
        else:
            import_model(options.hf_folder, options.checkpoint, dtype=options.dtype)
    except DistilError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(options.hf_folder if options.command == "export" else options.checkpoint)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser(
        "export", prog="tools/export", description="Writes a checkpoint as a folder that transformers loads."
    )
    out.add_argument("checkpoint", type=Path, help="a folder step_00000010 of a run, or one that tools/import made")
    out.add_argument("hf_folder", type=Path, help="made if absent")
    out.add_argument("--model", type=Path, help="configuration and tokenizer; default: the model of the checkpoint")
    back = commands.add_parser(
        "import",
        prog="tools/import",
        description="Writes a model in Hugging Face's format as a checkpoint of weights alone, for any parallel layout.",
    )
    back.add_argument("hf_folder", type=Path, help="config.json and *.safetensors")
    back.add_argument("checkpoint", type=Path, help="a folder that is not there yet")
    back.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
