"""``megatron-distil report``: one self-contained page of one or several runs. ``read`` reads, ``digest`` decides, ``page`` writes."""

from megatron_distil.report.page import write_report

__all__ = ["write_report"]
