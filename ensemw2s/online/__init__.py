"""Expert weights that learn while an ensemble is in use, from one answer after another."""

from ensemw2s.online.weights import OnlineWeights as OnlineWeights
from ensemw2s.online.weights import regret_bound as regret_bound
