"""Loaded before the tests, so that their own ``import megatron`` finds a machine without CUDA prepared."""

import megatron_distil.trainer  # noqa: F401
