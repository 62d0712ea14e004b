"""All that touches verl."""

__all__ = ["INSTALL_VERL", "SUPPORTED_VERL"]

SUPPORTED_VERL = "0.9.1"  # what the recipes are written for and tested with
INSTALL_VERL = f"pip install 'verl[verl-core]=={SUPPORTED_VERL}'"
