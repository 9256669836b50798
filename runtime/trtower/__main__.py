"""Run the command `trtower` as `python -m trtower`."""

from trtower.cli import main

main()
