"""From dialogues to what verl reads. Light: datasets, which need verl, are in `ffr_verl.data.datasets`."""
