"""Where programs written before 0.1.0 look for TRL's rows."""

from ffr_verl.integrations.trl import trl_dataset

__all__ = ["trl_dataset"]
