"""Where recipes that were copied before 0.1.0 look for the datasets."""

from ffr_verl.integrations.verl.datasets import FFRDataset, FFRSFTDataset

__all__ = ["FFRDataset", "FFRSFTDataset"]
