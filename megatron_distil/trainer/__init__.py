"""Everything Megatron. Importing this package makes megatron-core usable on a machine without CUDA."""

from megatron_distil.trainer import cpu

cpu.install()
