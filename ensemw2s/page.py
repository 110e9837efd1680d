"""The building blocks of the HTML page: the document, its style, figures, tables, and the guide for its reader."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable

from ensemw2s.tables import Rows


def document(title: str, body: str, guide: str) -> str:
    """Return a whole page that needs nothing but itself, with `guide` as its last section."""
    return _with_unique_ids(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n"
        f"{body}<section>{guide}</section>\n</main>\n</body>\n</html>\n"
    )


def _with_unique_ids(page: str) -> str:
    """Number the ids of each figure, since matplotlib gives the same ones to all; drop those nothing refers to."""
    numbers = itertools.count(1)

    def rename(match: re.Match[str]) -> str:
        figure, number = match[0], next(numbers)
        used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', figure))
        figure = re.sub(
            r' id="([^"]*)"', lambda found: f' id="f{number}-{found[1]}"' if found[1] in used else "", figure
        )
        return re.sub(r'(href="|url\()#', rf"\g<1>#f{number}-", figure)

    return re.sub(r"<svg.*?</svg>", rename, page, flags=re.DOTALL)


def definitions(facts: Iterable[tuple[str, str]]) -> str:
    """Return (name, value) facts as a list of definitions; those without a value are left out."""
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts if value
    )
    return f"<dl>{items}</dl>" if items else ""


def figure(svg: str, caption: str) -> str:
    """Return an inline figure with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def html_table(content: Rows, note: str) -> str:
    """Return a table with a note for its reader; cells are escaped."""
    headers, rows = content
    head = "".join(f'<th scope="col">{html.escape(header)}</th>' for header in headers)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div><p class="note">{html.escape(note)}</p>'


def reading_guide(*, pooled: bool) -> str:
    """Return what a reader should know about the figures: of single runs, or `pooled` over tasks and seeds."""
    points = [*GUIDE, *(GUIDE_POOLED if pooled else GUIDE_RUNS)]
    items = "\n".join(f"<li>{point}</li>" for point in points)
    return f"<h2>What these figures show, and what they do not</h2>\n<ul>\n{items}\n</ul>"


GUIDE = (
    """<strong>Right</strong> means that the whole answer is exact: at every answer token the most probable
token is the true one. There is no credit for a nearly right answer.""",
    """<strong>ID</strong> questions are as easy as those the experts were trained on; <strong>OOD</strong>
questions are harder. The truth about hard questions was used to score, and to train the ceiling, and for
nothing else.""",
    """<strong>Compare arms by their paired differences</strong>, not by whether whiskers overlap: all arms
answered the same questions. With several comparisons, one in twenty intervals misses the truth by
chance.""",
    """<strong>An ensemble costs as many models as it has experts</strong>, in training and for every answer.
The fair opponents are the uniform average of the same experts and the best of them; beating the single
baseline alone may only show that several models average out their mistakes.""",
    """<strong>PGR</strong> is a ratio, and unstable when the gap is small. It can be negative (the student is
worse than its weak baseline) or above 1.""",
    """<strong>Errors on training answers</strong> decide the weights but say little about new questions; the
validation curve does.""",
)
GUIDE_RUNS = (
    """<strong>Intervals</strong> cover the choice of test questions only. Another training seed would move
every figure by an amount that a single run cannot show. An arm that is right on none of 100 questions
may still be right on up to about 3.7% of such questions, although its standard error reads 0.""",
    """This is one task with one pair of models. It says nothing about other tasks, other sizes, or other gaps
between easy and hard.""",
)
GUIDE_POOLED = (
    """<strong>Intervals</strong> cover the choice of training seeds and of test questions, which are both
resampled within each task. With few seeds they are somewhat too short: S seeds understate the spread
between seeds by about √((S − 1)/S).""",
    """<strong>Tasks are fixed</strong>, not resampled, and all weigh the same: a pooled difference is about
these tasks. It says nothing about other tasks, other sizes, or other gaps between easy and hard.""",
    """<strong>Comparisons that were declared beforehand</strong> come first. The table of every arm against one
reference looks at many arms; some of its intervals will exclude 0 by chance.""",
)

_LIGHT = """--paper:#ffffff; --ink:#1c2126; --muted:#5c6670; --rule:#d9dee3; --band:#f4f6f8; --series-1:#0072b2;
--series-2:#d55e00; --series-3:#00805d; --series-4:#b3588f; --series-5:#a87400; --series-6:#2f86bd;
color-scheme:light;"""
_DARK = """--paper:#14171a; --ink:#e7eaed; --muted:#9ea8b2; --rule:#343b42; --band:#1e2328; --series-1:#5ab4ea;
--series-2:#f58a4b; --series-3:#3fc79f; --series-4:#e2a3c7; --series-5:#e8b64a; --series-6:#93cdf2;
color-scheme:dark;"""
STYLE = f"""
:root {{ {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
body {{ margin:0; background:var(--paper); color:var(--ink);
font:16px/1.55 system-ui,"Segoe UI","DejaVu Sans",sans-serif; }}
main {{ max-width:60rem; margin:0 auto; padding:1.5rem 1.25rem 4rem; }}
h1 {{ font-size:1.6rem; line-height:1.25; margin:.5rem 0 1rem; }}
h2 {{ font-size:1.25rem; margin:2.5rem 0 .75rem; padding-top:1rem; border-top:1px solid var(--rule); }}
h3 {{ font-size:1.05rem; margin:2rem 0 .5rem; }}
dl {{ display:grid; grid-template-columns:repeat(auto-fill,minmax(13rem,1fr)); gap:.5rem 1.5rem; margin:0; }}
dt {{ color:var(--muted); font-size:.8rem; }} dd {{ margin:0; overflow-wrap:anywhere; font-size:.92rem; }}
figure {{ margin:.75rem 0 1.5rem; }} figure svg {{ display:block; width:100%; height:auto; }}
figcaption, .note {{ color:var(--muted); font-size:.85rem; margin:.4rem 0 0; max-width:48rem; }}
.wide {{ overflow-x:auto; }}
table {{ border-collapse:collapse; width:100%; font-size:.88rem; font-variant-numeric:tabular-nums; }}
th, td {{ padding:.35rem .5rem; text-align:right; white-space:nowrap; vertical-align:top;
border-bottom:1px solid var(--rule); }}
th:first-child {{ text-align:left; padding-left:0; }}
tbody th {{ font-weight:500; white-space:normal; min-width:8rem; }}
thead th {{ white-space:normal; color:var(--muted); font-weight:600; vertical-align:bottom;
border-bottom:2px solid var(--rule); }}
pre {{ background:var(--band); padding:.75rem 1rem; border-radius:6px; font-size:.82rem; white-space:pre-wrap; }}
.check {{ background:var(--band); padding:.6rem .9rem; border-radius:6px; font-size:.9rem; }}
ul {{ padding-left:1.2rem; }} li {{ margin:.3rem 0; max-width:50rem; }}
@media print {{ main {{ max-width:none; padding:0; }} figure, tr, .check {{ break-inside:avoid; }}
h2, h3 {{ break-after:avoid; }}
body {{ font-size:10.5pt; }} .wide {{ overflow:visible; }} }}
"""
