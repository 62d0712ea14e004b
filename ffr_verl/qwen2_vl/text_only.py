"""Where recipes that were copied before 0.1.0 look for it; importing it does the work."""

from ffr_verl.integrations.verl import text_only as _  # noqa: F401
