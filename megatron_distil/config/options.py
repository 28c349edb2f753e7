"""Where a run lives. This is not part of what a run is, so it is no part of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Read from the command line and the environment by ``cli``, handed on to ``app``."""

    run: Path
    """The run directory."""
    registry: Path | None = None
    """Records of the servers; None: the run directory's own."""
    replay: Path | None = None
    """Another run whose logged rollouts are trained on instead of sampling."""
    export: Path | None = None
    """Where the model is written in Hugging Face's format at the end."""

    @property
    def registry_folder(self) -> Path:
        """Where the records are."""
        return self.registry or self.run / "registry"
