"""torchrun, with the exit code of the rank that failed first and one line about it: ``python -m launchers.torchrun ...``.

The stock command ends with 1 whatever a rank ended with, below a traceback of its own. The arguments are the same.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXIT_STOPPED = 130
"""As in ``megatron_distil.cli``."""


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would say the same in ten lines
    try:
        run.run(run.parse_args(arguments))
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
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
