"""Models with made weights at the true widths, for benchmarks: no download, and little to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_local
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.load import load_made
from moe_local.offload.measure import synthetic
from moe_local.offload.measure.shapes import published_layers
from moe_local.offload.options import LoadOptions


class Made:
    """The model of `moe-local bench --synthetic NAME`, made below MOE_LOCAL_HOME on first use."""

    def __init__(self, name: str, layers: int | None = None) -> None:
        """`layers`: by default all of the published model. Raises OptionError for unknown names."""
        self.checkpoint = synthetic.describe(name, layers or published_layers(name))

    @property
    def folder(self) -> Path:
        """The model's folder, which holds config.json once the model is made."""
        return self.checkpoint.folder

    def make(self) -> ExpertFile:
        return synthetic.make(self.checkpoint)

    def load(self, **keywords: Any) -> moe_local.Model:
        """Load the model, with the keywords of `moe_local.load`."""
        return load_made(self.checkpoint, self.make, LoadOptions.from_keywords(keywords))
