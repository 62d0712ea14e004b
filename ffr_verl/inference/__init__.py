"""Answers of a model to prepared rows. `generate` imports vLLM when it runs; the package itself stays light."""
