"""The README of a saved ensemble: what a stranger needs to load it, use it, and judge how it was made."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ensemw2s.models.mixture import ExpertMixture

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# What packages call a license in their metadata, and what model cards call it.
_LICENSE_NAMES = {"apache-2.0": "apache-2.0", "apache 2.0": "apache-2.0", "mit": "mit", "mit license": "mit"}
_COMBINE = {
    "prob": "p(v) = Σ w_t p_t(v), the weighted mean of the experts' distributions",
    "logprob": "p(v) ∝ exp(Σ w_t log p_t(v)), a product of experts",
    "vote": "p(v) = Σ w_t 1[v = argmax p_t], a weighted vote",
}
# What a round's record calls a figure, and what the card does.
_COLUMNS = {
    "round": "round",
    "attempt": "attempt",
    "error": "weighted error",
    "expert_weight": "expert weight",
    "accepted": "accepted",
    "effective_sample_size": "effective sample size after",
    "num_units": "sample units",
}
_USE = """\
```python
from transformers import AutoTokenizer

from ensemw2s import TokenEnsemble

ensemble = TokenEnsemble.from_pretrained("this-folder")
tokenizer = AutoTokenizer.from_pretrained("this-folder", padding_side="left")
batch = tokenizer(["a prompt"], return_tensors="pt")
ids = ensemble.generate(**batch, max_new_tokens=32)
print(tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Evaluate

With [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) (`pip install lm-eval`):

```python
import lm_eval
from lm_eval.models.huggingface import HFLM

model = HFLM(pretrained=ensemble, tokenizer=tokenizer, batch_size=8)
print(lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])["results"])
```
"""


def model_card(ensemble: ExpertMixture, record: Mapping[str, Any] | None = None) -> str:
    """Return a README with front matter that `huggingface_hub.ModelCard` reads.

    Args:
        ensemble: the ensemble; its license is named only if the sources of all its models name the same one.
        record: `BoostingTrainer.record()`; None leaves out the section on boosting.
    """
    sources = _sources(ensemble)
    licenses = {license_of(source) for source in sources}
    on_hub = [source for source in sources if _HUB_ID.match(source) and not Path(source).exists()]
    data = ModelCardData(
        library_name="ensemw2s",
        pipeline_tag="text-generation",
        tags=["ensemble", "weak-to-strong", "boosting"],
        base_model=on_hub or None,
        license=licenses.pop() if len(licenses) == 1 else None,
    )
    sections = [f"# A token-level ensemble of {ensemble.num_experts} experts", _description(ensemble, sources)]
    sections += ["## Experts", _experts_table(ensemble)]
    if record is not None:
        sections += ["## Boosting", *_boosting(record)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([*sections, "## Use", _USE])


def license_of(source: str) -> str | None:
    """Return the license that a model source names: in a folder's README.md, or in a package's metadata; else None."""
    kind, separator, name = source.partition(":")
    if separator and kind == "package":
        try:
            fields = importlib.metadata.metadata(name.replace("_", "-")).json
        except importlib.metadata.PackageNotFoundError:
            return None
        return _LICENSE_NAMES.get(str(fields.get("license_expression") or fields.get("license")).lower())
    readme = Path(source) / "README.md"
    # Without a name there is no folder: the empty path would be the working directory.
    if not source or not readme.is_file():
        return None
    try:
        named = ModelCard.load(readme, ignore_metadata_errors=True).data.get("license")
    except Exception:
        # Whatever a stranger's README looks like, no ensemble is lost for it.
        return None
    return named if isinstance(named, str) else None


def _sources(ensemble: ExpertMixture) -> list[str]:
    """Return where the base, or each whole model, was loaded from; an empty text stands for nowhere."""
    if ensemble.config.base:
        return [str(ensemble.config.base["source"])]
    count = ensemble.num_experts if ensemble.config.kind == "models" else 1
    return list(dict.fromkeys(str(ensemble.experts.expert_config(t)._name_or_path) for t in range(count)))


def _description(ensemble: ExpertMixture, sources: list[str]) -> str:
    config = ensemble.config
    if config.kind == "adapters":
        kept = f", layers {config.base['keep_layers']}" if config.base and config.base.get("keep_layers") else ""
        where = "loaded from there" if config.base else "saved in `base/`"
        kind = f"Each expert is an adapter on one base model: {_named(sources[0])}{kept} ({where})."
    else:
        kind = f"Each expert is a whole model, made from {', '.join(map(_named, sources))}."
    return (
        f"Made by ensemw2s. {kind} All experts see the same prefix, and each next token comes from their combined "
        f"distribution.\n\nCombination: `{config.combine}`: {_COMBINE[config.combine]}. Vocabulary: "
        f"{config.vocab_size:,} tokens. Context: {config.max_position_embeddings or 'not stated'} tokens."
    )


def _named(source: str) -> str:
    if not source:
        return "a model without a name"
    # A path says nothing to a stranger, and something about the user.
    return "a local folder" if Path(source).exists() else f"`{source}`"


def _experts_table(ensemble: ExpertMixture) -> str:
    weights = ensemble.config.expert_weights
    rows = [f"| {t} | {w:.4f} | {w / sum(weights):.4f} |" for t, w in enumerate(weights, 1)]
    return "\n".join(["| expert | weight | share |", "|---|---|---|", *rows])


def _boosting(record: Mapping[str, Any]) -> list[str]:
    names = ("recipe", "sampling", "errors", "shrinkage", "uniform_mix", "effective_sample_size_floor", "warm_start",
             "mixture_weights", "unit", "seed")  # fmt: skip
    settings = ", ".join(f"{name} `{record[name]}`" for name in names if record.get(name) is not None)
    rounds = [row for row in record.get("rounds", []) if isinstance(row, Mapping)]
    # Rounds that were tried again with another seed have a row for each attempt.
    rows = ["| " + " | ".join(_cell(row.get(name)) for name in _COLUMNS) + " |" for row in rounds]
    table = ["| " + " | ".join(_COLUMNS.values()) + " |", "|---" * len(_COLUMNS) + "|", *rows]
    prior = next((row["prior_error"] for row in rounds if row.get("prior_error") is not None), None)
    error = "" if prior is None else f" The error before any fine-tuning is {prior:.4f}."
    stopped = record.get("stop_reason") or "all rounds were run"
    return [
        f"Settings: {settings or 'not recorded'}.{error}",
        "\n".join(table),
        f"Why boosting ended: {stopped}.",
    ]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else "–" if value is None else str(value)
