"""`TokenEnsemble`: the mixture as one transformers model, its experts, its cache, its folder."""

from ensemw2s.ensemble import model as model
