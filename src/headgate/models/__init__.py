"""Floor 2: the only code that knows the internals of transformers and PEFT.

``register_family(model_type, Family(...))`` describes an architecture that Headgate does not know.
"""

from headgate.models.families import Family as Family
from headgate.models.families import Inside as Inside
from headgate.models.families import register_family as register_family
