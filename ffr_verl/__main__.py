"""`python -m ffr_verl` is the command `ffr-verl`."""

from ffr_verl.cli import main

main()
