"""``mabridge demo``: several scripted agents at work in real sandboxes, on a platform that runs in this process."""

from __future__ import annotations

from mabridge.demo.choose import Choice
from mabridge.demo.show import run_demo

__all__ = ["Choice", "run_demo"]
