"""``python -m mabridge.cli`` is ``mabridge``."""

from __future__ import annotations

from mabridge.cli import main

main(prog_name="mabridge")
