"""Sources, templates with exact label masks, packing, collation, skill streams and the generated word problems."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_PLACES = {
    "Collator": "collation",
    "DataConfig": "config",
    "DataReport": "preparation",
    "PreparedDataset": "preparation",
    "SOURCES": "readers",
    "SkillConfig": "config",
    "SkillData": "streams",
    "Source": "readers",
    "SourceConfig": "config",
    "check_disjoint": "contamination",
    "content_digest": "identity",
    "encode": "templates",
    "load_data": "sources",
    "load_rows": "sources",
    "load_stream": "streams",
    "pack": "packing",
    "prepare": "preparation",
    "prompt_ids": "templates",
    "register_source": "readers",
    "split_rows": "sources",
}

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

if TYPE_CHECKING:
    from .collation import Collator as Collator
    from .config import DataConfig as DataConfig
    from .config import SkillConfig as SkillConfig
    from .config import SourceConfig as SourceConfig
    from .contamination import check_disjoint as check_disjoint
    from .identity import content_digest as content_digest
    from .packing import pack as pack
    from .preparation import DataReport as DataReport
    from .preparation import PreparedDataset as PreparedDataset
    from .preparation import prepare as prepare
    from .readers import SOURCES as SOURCES
    from .readers import Source as Source
    from .readers import register_source as register_source
    from .sources import load_data as load_data
    from .sources import load_rows as load_rows
    from .sources import split_rows as split_rows
    from .streams import SkillData as SkillData
    from .streams import load_stream as load_stream
    from .templates import encode as encode
    from .templates import prompt_ids as prompt_ids


def __getattr__(name: str) -> object:
    """The public names, imported when first used: a configuration is read without torch or datasets."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"headgate.data.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'headgate.data' has no attribute {name!r}")
