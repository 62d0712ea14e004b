"""See `ffr_verl.settings`."""

from ffr_verl.settings import DEFAULT_MAX_PIXELS, DataConfig

__all__ = ["DEFAULT_MAX_PIXELS", "DataConfig"]
