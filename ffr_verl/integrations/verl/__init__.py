"""All that touches verl."""

__all__ = ["SUPPORTED_VERL"]

SUPPORTED_VERL = "0.9.1"  # what the recipes are written for and tested with
