"""What a terminal shows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


def quiet_libraries() -> None:
    """Silence what transformers and datasets print beside our own messages."""
    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def say(line: str) -> None:
    """Print a line for the reader, above a progress bar that may be on the screen."""
    from tqdm.auto import tqdm

    tqdm.write(line)


def no_model_bars() -> AbstractContextManager[None]:
    """Within the block, transformers shows no bar for each model that it loads or saves; an ensemble has many."""
    from transformers.utils import logging

    return _no_bars(logging)


def no_dataset_bars() -> AbstractContextManager[None]:
    """Within the block, datasets shows no bar for what it does with rows."""
    import datasets

    return _no_bars(datasets)


@contextmanager
def _no_bars(library: Any) -> Iterator[None]:
    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()
