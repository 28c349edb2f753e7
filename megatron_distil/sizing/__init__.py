"""What a run needs: processes by role, memory of each part, bytes that travel, seconds. Pure arithmetic; reads only ``config.json``."""

from megatron_distil.sizing.layout import Layout as Layout
from megatron_distil.sizing.machine import GPUS as GPUS
from megatron_distil.sizing.machine import H200_NODES as H200_NODES
from megatron_distil.sizing.machine import Machine as Machine
from megatron_distil.sizing.machine import machine as machine
from megatron_distil.sizing.page import print_plan as print_plan
from megatron_distil.sizing.parts import Part as Part
from megatron_distil.sizing.parts import Span as Span
from megatron_distil.sizing.parts import human as human
from megatron_distil.sizing.parts import peak as peak
from megatron_distil.sizing.plan import Sizes as Sizes
from megatron_distil.sizing.plan import nearest as nearest
from megatron_distil.sizing.plan import problems as problems
from megatron_distil.sizing.plan import shortfalls as shortfalls
from megatron_distil.sizing.plan import sizes as sizes
from megatron_distil.sizing.shape import ModelShape as ModelShape
