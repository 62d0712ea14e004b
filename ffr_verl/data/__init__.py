"""From dialogues to what verl reads; the datasets, which need verl, are in `ffr_verl.integrations.verl.datasets`."""
