"""Turn down what the libraries underneath print."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries underneath are not part of this program's output."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
