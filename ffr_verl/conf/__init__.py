"""Hydra's root for `+recipe=NAME`: the folder `recipe` holds the YAML files of the repository's `recipes/`."""
