"""Sources, templates with exact label masks, packing, collation, skill streams and the generated word problems."""

from .collation import Collator
from .config import DataConfig, SkillConfig, SourceConfig
from .contamination import check_disjoint
from .packing import pack
from .prepare import DataReport, PreparedDataset, prepare
from .sources import load_data, load_rows, split_rows
from .streams import SkillData, load_stream
from .templates import encode, prompt_ids

__all__ = [
    "Collator",
    "DataConfig",
    "DataReport",
    "PreparedDataset",
    "SkillConfig",
    "SkillData",
    "SourceConfig",
    "check_disjoint",
    "encode",
    "load_data",
    "load_rows",
    "load_stream",
    "pack",
    "prepare",
    "prompt_ids",
    "split_rows",
]
