"""What the kernels' time on an H100 should be, out of bytes, instructions and launches: the table of the docs.

    python -m benchmarks.ops.predict_gpu docs/explanation/gpu.md

Instructions were counted in the machine code for sm_90. Where `benchmarks/results/` holds a CSV of `make gpu-check`,
what was measured stands beside the prediction.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
START, START_LINEAR, END = "<!-- predicted -->", "<!-- predicted with the head -->", "<!-- end -->"

# An H100 with HBM3. What a copy reaches of its 3.35 TB/s is taken to be 90%.
BANDWIDTH = 0.9 * 3.35e12
CACHE, CACHE_BANDWIDTH = 40e6, 5.5e12
MULTIPROCESSORS, CLOCK = 132, 1.755e9
INSTRUCTIONS = MULTIPROCESSORS * 4 * 32 * CLOCK  # of single threads, a second
# A block alone reads no more than a multiprocessor's way to the cache lets through: 64 bytes a cycle.
BLOCK_BANDWIDTH = 64 * CLOCK
# What products of large 16-bit matrices reach of the 989e12 operations a second that the card is sold with.
PRODUCTS = 0.7 * 989e12
# Assumptions, in microseconds: a kernel after an idle time or in order behind another; one that starts early; the way
# to memory and back at the beginning and the end of a kernel; to the cache and back.
LAUNCH, EARLY, MEMORY, CACHE_ROUND = 2.5, 1.0, 1.2, 0.15
ROWS = (1, 8, 32, 256)


@dataclass(frozen=True)
class Pass:
    """One reading of all experts' logits.

    Attributes:
        instructions: of one thread for each logit.
        written: bytes for each token of the vocabulary.
        again: whether the logits were read before, and lie in the cache as far as they fit.
        by_rows: whether a block reads a whole row; few rows then leave most of the card idle.
    """

    instructions: float
    written: int = 0
    again: bool = False
    by_rows: bool = False

    def microseconds(self, experts: int, vocabulary: int, rows: int) -> float:
        """The longer of the time for memory and the time for instructions."""
        tokens = rows * vocabulary
        if self.by_rows:
            idle = math.ceil(rows / MULTIPROCESSORS) * MULTIPROCESSORS / rows
            block = idle / MULTIPROCESSORS * (2 * experts + self.written) * tokens / BLOCK_BANDWIDTH
        else:
            idle, block = 1.0, 0.0
        logits = experts * tokens
        read = 2 * logits
        cached = min(read, CACHE) if self.again else 0.0
        memory = (read - cached + self.written * tokens) / BANDWIDTH + cached / CACHE_BANDWIDTH
        return MEMORY + 1e6 * max(memory, block, idle * self.instructions * logits / INSTRUCTIONS)


@dataclass(frozen=True)
class Case:
    """One op in one setting, bfloat16.

    Attributes:
        finish: microseconds of the kernels with a block for each row, after the first row's start.
        reread: the share of rows whose logits their block reads once more.
        early: launches that start while the kernel before them runs.
        ordered: the other launches.
    """

    op: str
    name: str
    backend: str
    experts: int
    vocabulary: int
    passes: tuple[Pass, ...]
    early: int = 0
    ordered: int = 1
    finish: float = 0.0
    reread: float = 0.0

    def bytes(self, rows: int) -> float:
        """What has to be read and written once."""
        tokens = rows * self.vocabulary
        return 2 * self.experts * tokens + sum(x.written for x in self.passes) * tokens

    def microseconds(self, rows: int) -> float:
        reading = sum(x.microseconds(self.experts, self.vocabulary, rows) for x in self.passes)
        time = LAUNCH * self.ordered + EARLY * self.early + reading
        waves = math.ceil(rows / MULTIPROCESSORS)
        again = 2 * self.experts * self.vocabulary
        some = 1 - (1 - self.reread) ** min(rows, MULTIPROCESSORS)  # the chance that a wave has such a row
        by_block, by_card = waves * some * again / BLOCK_BANDWIDTH, rows * self.reread * again / BANDWIDTH
        return time + waves * self.finish + 1e6 * max(by_block, by_card)


def finish_of(experts: int, vocabulary: int, *, selects: int = 0, races: int = 0) -> float:
    """Microseconds of a row's block of 512 threads in `sample_kernel`, counted in rounds to the cache and back.

    Totals of the experts, bounds of the groups of 32 tokens, a look at them, one token in double; for top-k and top-p
    two passes of a selection by key and a ranking, for a race the noise of the tokens that can win.
    """
    rounds = math.ceil(vocabulary / 32 / 512)
    totals, exact, output = 1.2, 1.5, 1.0
    bounds = rounds * math.ceil(experts / 4) * CACHE_ROUND
    look = rounds * CACHE_ROUND + 0.5
    selection = 2 * (rounds * CACHE_ROUND + 0.4)
    return totals + bounds + look + exact + output + selects * (selection + look + 1.0) + races * (2 * look + exact)


def cases() -> Iterator[Case]:
    """Every kernel; the counts of instructions are those of the machine code."""
    size, experts = 151_936, 8
    scan, noise = Pass(10.8), Pass(10.8 + 16 / experts)
    sample = {"experts": experts, "vocabulary": size, "early": 1}
    greedy = finish_of(experts, size)
    yield Case("mixture_sample", "greedy", "cuda", passes=(scan,), finish=greedy, **sample)
    both = finish_of(experts, size, selects=1)
    yield Case("mixture_sample", "top-k 50 + top-p 0.9", "cuda", passes=(scan,), finish=both, **sample)
    raced = finish_of(experts, size, races=1)
    yield Case("mixture_sample", "plain", "cuda", passes=(noise,), finish=raced, **sample)
    # The likeliest tokens tell whether the winner lies in the nucleus. Where it does not, in one of ten rows, the
    # weight of all others is needed.
    nucleus = {"finish": raced + both - 3.7, "reread": 0.1}
    yield Case("mixture_sample", "top-p 0.9 at 0.7", "cuda", passes=(noise,), **nucleus, **sample)
    write = Pass(14.3, written=4, again=True)
    yield Case("mixture_log_probs", "prob", "cuda", experts, size, (scan, write), early=2, finish=1.5)
    entropy = (Pass(18), Pass(28, again=True))
    yield Case("mixture_scores", "prob", "triton", experts, size, entropy, ordered=4, finish=3.0)
    size = 128_256
    yield Case("token_scores", "", "triton", 1, size, (Pass(23.5),), ordered=2, finish=1.5)
    with_gradient = (Pass(14, by_rows=True), Pass(16.6, written=4, again=True, by_rows=True))
    yield Case("weighted_cross_entropy", "with gradient", "triton", 1, size, with_gradient)
    with_gradient = (Pass(14, by_rows=True), Pass(16.5, written=4, again=True, by_rows=True))
    yield Case("mixture_kl", "5 experts and the student, with gradient", "triton", 6, size, with_gradient)
    with_gradient = (Pass(22, by_rows=True), Pass(28, written=4, again=True, by_rows=True))
    yield Case("topk_kl", "64 tokens, with gradient", "triton", 1, size, with_gradient)


def linear_cross_entropy(rows: int, width: int, vocabulary: int) -> tuple[float, float, float]:
    """Milliseconds of the three products, of the row kernel, and of the head's float32 gradient; forward and backward.

    Each of the 2**27 logits of a chunk is read by the kernel, which writes its gradient; a row is still in the cache
    when it is read again. The head's gradient is set to 0, read and written by each chunk's product, rounded and
    scaled. Nothing of that is taken to happen during a product, although some of it will.
    """
    head = width * vocabulary
    products = 3 * 2 * rows * head / PRODUCTS
    logits = rows * vocabulary
    kernel = 4 * logits / BANDWIDTH + 2 * logits / CACHE_BANDWIDTH
    chunks = math.ceil(rows / (2**27 // vocabulary // 256 * 256))
    sums = (4 + 8 * chunks + 4 + 2 + 2 + 2) * head / BANDWIDTH
    return 1e3 * products, 1e3 * kernel, 1e3 * sums


def linear_table() -> str:
    """Markdown: `linear_weighted_cross_entropy` with all rows, and with 15% of them."""
    lines = ["| rows that count | products | row kernel | head's gradient | predicted, ms |", "|---|---|---|---|---|"]
    for share in (1.0, 0.15):
        parts = linear_cross_entropy(round(share * 8_192), 4_096, 131_072)
        cells = (f"{share:.0%} of 8,192", *(f"{part:.1f}" for part in parts), f"{sum(parts):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured() -> dict[tuple[str, str, str, int], str]:
    """Medians of `make gpu-check` by op, case, backend and rows."""
    found = {}
    for path in sorted(RESULTS.glob("gpu-*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found[row["op"], row["case"], row["impl"], int(row["B"])] = f"{float(row['median_us']):.0f}"
    return found


def table() -> str:
    """Markdown: a row for each op, setting and number of rows."""
    lines = [
        "| op | setting | backend | rows | MB | instructions a logit | launches | predicted, µs | measured, µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = measured()
    for case in cases():
        counts = " + ".join(f"{x.instructions:.3g}" for x in case.passes)
        for rows in ROWS:
            time = known.get((case.op, case.name, case.backend, rows), "")
            cells = (f"`{case.op}`", case.name, case.backend, str(rows), f"{case.bytes(rows) / 1e6:.3g}", counts)
            launches, predicted = str(case.early + case.ordered), f"{case.microseconds(rows):.0f}"
            lines.append(f"| {' | '.join((*cells, launches, predicted, time))} |".replace("|  |", "| |"))
    return "\n".join(lines)


def refreshed(page: str) -> str:
    """The page with its tables made anew."""
    for start, made in ((START, table()), (START_LINEAR, linear_table())):
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(END)
        page = f"{before}{start}\n\n{made}\n\n{END}{after}"
    return page


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(refreshed(file.read_text()))
