"""Saved ensembles in vLLM: its plug-in, the configuration and the model that it loads. vLLM is imported here alone."""
