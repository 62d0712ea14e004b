"""All that touches verl."""

__all__ = ["INSTALL_VERL", "ROW_NUMBER", "SUPPORTED_VERL"]

ROW_NUMBER = "ffr_row"  # what `FFRDataset` calls the number of a row, and `FFRReplayBuffer` looks for
SUPPORTED_VERL = "0.9.1"  # what the recipes are written for and tested with
INSTALL_VERL = f"pip install 'verl[verl-core]=={SUPPORTED_VERL}'"
