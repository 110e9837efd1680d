"""Questions of letters, for models that are trained from scratch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import numpy as np

# Questions are about these letters, clutter is made of the others: the word `reverse` shares none with its argument.
LETTERS = "bdfghijklmnu"


# Task -> its symbol in the training text, and what it does to the letters.
TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "reverse": ("<", lambda letters: letters[::-1]),
    "copy": ("", lambda letters: letters),
}


def character_questions(task: str, size: int, seed: int, min_length: int, max_length: int) -> list[dict[str, str]]:
    """Make distinct questions such as prompt "reverse dig", answer "gid".

    Args:
        task: "reverse" or "copy".
        size: how many questions.
        seed: fixes them.
        min_length: fewest letters of a question. Its length is drawn uniformly from the closed range, its letters
            without repetition; what was drawn before is drawn again.
        max_length: most letters.

    Raises:
        ValueError: an unknown task (names the nearest), lengths that are no range within 1 to 12 (the models were
            trained on up to 6), or more questions than there are.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(TASKS)}"
        raise ValueError(f"there is no character task {task!r}: {hint}")
    if not 1 <= min_length <= max_length <= len(LETTERS):
        raise ValueError(
            f"min_length and max_length must satisfy 1 <= min_length <= max_length <= {len(LETTERS)}, "
            f"got {min_length} and {max_length}"
        )
    possible = sum(math.perm(len(LETTERS), length) for length in range(min_length, max_length + 1))
    if size > possible:
        raise ValueError(
            f"{task} with {min_length} to {max_length} letters has {possible} distinct questions, {size} are wanted: "
            "ask for fewer or raise max_length"
        )
    generator = np.random.default_rng(seed)
    chosen: dict[str, None] = {}
    while len(chosen) < size:
        chosen[draw_letters(generator, min_length, max_length)] = None
    answer = TASKS[task][1]
    return [{"prompt": f"{task} {letters}", "answer": answer(letters)} for letters in chosen]


def draw_letters(generator: np.random.Generator, min_length: int, max_length: int) -> str:
    """Return `min_length` to `max_length` random letters."""
    length = generator.integers(min_length, max_length, endpoint=True)
    return "".join(LETTERS[index] for index in generator.permutation(len(LETTERS))[:length])
