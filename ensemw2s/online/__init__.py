"""Expert weights that learn while an ensemble is in use: from answers that turn out right or wrong, one after another."""

from ensemw2s.online.weights import OnlineWeights as OnlineWeights
from ensemw2s.online.weights import regret_bound as regret_bound
