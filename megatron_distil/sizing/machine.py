"""GPUs and links by their data sheets, and how much of that a run gets: the assumptions behind every second of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_distil.errors import ConfigError, Problem

GB = 10**9
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_bytes: float
    flops: float
    """Dense bfloat16, per second."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the GPUs of its node, one direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A cluster of equal nodes."""

    gpu: Gpu
    gpus_per_node: int = 8
    network_bytes_per_s: float = 50 * GB
    """Of one GPU to other nodes, one direction: InfiniBand NDR, 400 Gbit/s."""
    disk_bytes_per_s: float = 2 * GB
    """Of the shared file system, one client; an assumption, ``launchers preflight`` measures it."""
    compute_efficiency: float = 0.4
    """Share of ``flops`` that matrix products of a training step reach. Megatron-LM's README reports 0.41 to 0.48 on H100."""
    memory_efficiency: float = 0.7
    """Share of the memory bandwidth that decoding reaches; an assumption."""
    link_efficiency: float = 0.7
    """Share of a link that a ring of NCCL reaches; an assumption."""
    usable_frac: float = 0.92
    """Share of the GPU's memory that a plan may fill; the rest is what the allocator cannot use."""
    server_frac: float = 0.85
    """Share of the GPU's memory that a server gives to weights, keys and values (SGLang's ``mem_fraction_static``)."""

    def ring_bytes_per_s(self, span: int) -> float:
        """Of collectives over ranks that lie within ``span`` consecutive GPUs."""
        fits = span <= self.gpus_per_node
        return self.link_efficiency * (self.gpu.link_bytes_per_s if fits else self.network_bytes_per_s)


GPUS = {
    # NVIDIA's data sheets of the SXM boards; flops without sparsity, NVLink halved to one direction
    "h200": Gpu(
        name="H200",
        memory_bytes=141 * GB,
        flops=989e12,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450 * GB,
    ),
    "h100": Gpu(
        name="H100",
        memory_bytes=80 * GB,
        flops=989e12,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450 * GB,
    ),
}
H200_NODES = Machine(gpu=GPUS["h200"])


def machine(gpu: str, *, gpus_per_node: int) -> Machine | None:
    """Nodes with that GPU; None for ``cpu``, whose memory and speed are not known.

    Raises:
        ConfigError: no such GPU.
    """
    if gpu == "cpu":
        return None
    if gpu not in GPUS:
        raise ConfigError([Problem("--gpu", gpu, "its data sheet is not known", f"Use {', '.join(GPUS)} or cpu.")])
    return Machine(gpu=GPUS[gpu], gpus_per_node=gpus_per_node)


CONTEXT_BYTES = 1536 * MIB
"""CUDA context, kernels and workspaces of torch, cuBLAS and TransformerEngine; an assumption."""
NCCL_GROUP_BYTES = 256 * MIB
"""Of one communicator: 32 channels with a buffer of 4 MiB (NCCL's default ``NCCL_BUFFSIZE``) in either direction; an estimate."""
