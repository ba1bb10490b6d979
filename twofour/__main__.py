"""`python -m twofour`: the command line, where no console script is installed."""

from twofour.cli import main

main()
