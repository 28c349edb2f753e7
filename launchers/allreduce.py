"""One rank of a measured all-reduce: NCCL where there is a GPU, else gloo. Started by ``preflight``, in the trainer's Python.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=... MASTER_PORT=... python -m launchers.allreduce BYTES TIMEOUT_S

Rank 0 prints JSON: backend, ranks, bytes, seconds of the quickest round, and the bus bandwidth 2 (n - 1) / n bytes / s that
nccl-tests define (doc/PERFORMANCE.md there), which a link's own bandwidth is compared with.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time

import torch
import torch.distributed as dist

ROUNDS = 5


def main(argv: list[str]) -> int:
    """Sum ``argv[0]`` bytes of float32 over all ranks, several times."""
    num_bytes, timeout_s = int(argv[0]), float(argv[1])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    rank, size = dist.get_rank(), dist.get_world_size()
    values = torch.empty(num_bytes // 4, device="cuda" if has_gpu else "cpu")
    best = float("inf")
    for _ in range(1 + ROUNDS):  # the first sets up connections, and counts only if it is the only quick one
        values.fill_(rank + 1.0)
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(values)
        if has_gpu:
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - start)
    wanted = size * (size + 1) / 2
    if not bool((values == wanted).all()):
        print(f"rank {rank}: the sum over {size} ranks is {values[0].item()}, not {wanted}", file=sys.stderr)
        return 1
    if rank == 0:
        bus = 2 * (size - 1) / size * num_bytes / best
        found = {"backend": backend, "ranks": size, "bytes": num_bytes, "seconds": best, "bus_bytes_per_s": bus}
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
