"""One language model: loaded, thinned, its head replaced; and the protocol of many."""
