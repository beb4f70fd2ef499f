"""wordmath: generated grade-school word problems with worked reasoning, read like GSM8K.

Every row carries ``question`` and ``answer`` (a sentence with ``<<3*4=12>>12`` per step, then ``#### n``). The
hash of a problem's structure decides its split, so splits are disjoint whatever the seed.
"""

from .generate import (
    FAMILIES,
    PRETRAINING_FAMILIES,
    SPLITS,
    TARGET_FAMILIES,
    VERSION,
    generate,
    paraphrase,
    split_of,
)

__all__ = [
    "FAMILIES",
    "PRETRAINING_FAMILIES",
    "SPLITS",
    "TARGET_FAMILIES",
    "VERSION",
    "generate",
    "paraphrase",
    "split_of",
]
