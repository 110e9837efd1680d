"""A TokenEnsemble on a GPU decodes what it decodes on the CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ensemw2s.ensemble.model import TokenEnsemble
from tests import tiny

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("ENSEMW2S_TEST_DEVICE", "cuda")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combine", ["prob", "logprob"])
def test_greedy_text_is_that_of_the_cpu(combine, fused):
    models = [tiny.llama(seed) for seed in range(3)]
    ensemble = TokenEnsemble.from_models(models, [1.0, 2.0, 0.5], combine=combine)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, tiny.VOCAB, (6, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[:3, :4] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tiny.PAD, "fused": fused}
    expected = ensemble.generate(ids, attention_mask=mask, **settings)
    moved = ensemble.to(DEVICE)
    got = moved.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.skipif(find_spec("datasets") is None, reason="the pipeline needs the datasets package")
def test_the_quick_pipeline(tmp_path, monkeypatch):
    from ensemw2s.cli import main

    monkeypatch.setenv("ENSEMW2S_CACHE", str(tmp_path / "cache"))
    config = Path(__file__).parents[2] / "examples" / "insert_letters.yaml"
    assert main(["run", str(config), "--quick", f"output_dir={tmp_path / 'run'}"]) == 0
    assert list(tmp_path.glob("run/*/report.html"))
