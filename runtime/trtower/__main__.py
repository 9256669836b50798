"""`python -m trtower` is the command `trtower`."""

from trtower.cli import main

main()
