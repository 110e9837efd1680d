"""What a terminal shows."""

from __future__ import annotations

import warnings


def quiet_libraries() -> None:
    """Silence what transformers and datasets print beside our own messages."""
    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
