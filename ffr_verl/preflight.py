"""Where recipes that were copied before 0.1.0 look for the preflight check."""

from ffr_verl.integrations.verl.preflight import RecipeCallback

__all__ = ["RecipeCallback"]
