"""`python -m dptaft`."""

from dptaft.cli import main

main(prog_name="dptaft")
