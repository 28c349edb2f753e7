"""torchrun, with the exit code of the rank that failed first and one line about it: ``python -m launchers.torchrun ...``.

The stock command ends with 1 whatever a rank ended with, below a traceback of its own. The arguments are the same. On a
cluster the first node, and no other one, keeps the store where the nodes meet; the stock command compares addresses with
those of the machine's own name, which often is 127.0.1.1.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from megatron_distil.registry import Registry

EXIT_STOPPED = 130
"""As in ``megatron_distil.cli``."""
_STORE_TIMEOUT_S = 600


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would say the same in ten lines
    options = run.parse_args(arguments)
    node = int(os.environ.get("SLURM_PROCID", "0"))
    if options.nnodes != "1":
        meet(options, node)
    try:
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == EXIT_STOPPED:  # every rank does, after it has saved
            return code
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        print(f"rank {rank} {how}, before all others; the others were ended", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        text = f"the ranks cannot meet at {options.rdzv_endpoint}: {error.__cause__ or error}"
        print(text, file=sys.stderr)
        if node == 0:  # another node says the same when the one that keeps the store has ended, whatever it ended of
            _say_reason(f"failed {text}")
        return 1
    return 0


def _say_reason(text: str) -> None:
    if folder := os.environ.get("MEGATRON_DISTIL_REGISTRY"):
        Registry(folder).say_reason(text)


def meet(options: argparse.Namespace, node: int) -> None:
    """Say who keeps the store, and wait for it as long as slow nodes need to import torch."""
    given = [options.rdzv_conf] if options.rdzv_conf else []
    options.rdzv_conf = ",".join([*given, f"is_host={node == 0}", f"read_timeout={_STORE_TIMEOUT_S}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
