"""`python -m inkdrop`."""

from inkdrop.cli import main

main()
