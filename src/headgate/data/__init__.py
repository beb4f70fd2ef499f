"""Sources, templates with exact label masks, packing, collation, skill streams and the generated word problems."""

from .collation import Collator
from .config import DataConfig, SkillConfig, SourceConfig
from .contamination import check_disjoint
from .identity import content_digest
from .packing import pack
from .prepare import DataReport, PreparedDataset, prepare
from .readers import SOURCES, Source, register_source
from .sources import load_data, load_rows, split_rows
from .streams import SkillData, load_stream
from .templates import encode, prompt_ids

__all__ = [
    "SOURCES",
    "Collator",
    "DataConfig",
    "DataReport",
    "PreparedDataset",
    "SkillConfig",
    "SkillData",
    "Source",
    "SourceConfig",
    "check_disjoint",
    "content_digest",
    "encode",
    "load_data",
    "load_rows",
    "load_stream",
    "pack",
    "prepare",
    "prompt_ids",
    "register_source",
    "split_rows",
]
