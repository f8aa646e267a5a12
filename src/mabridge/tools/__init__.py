"""The tools of ``agent_toolset_20260401`` over any `mabridge.sandbox.Sandbox`.

They need nothing in the sandbox but ``/bin/sh`` and the usual small programs, those of busybox included.
"""

from __future__ import annotations

from mabridge.tools.limits import ToolLimits
from mabridge.tools.result import ToolResult
from mabridge.tools.toolset import SandboxTools

__all__ = ["SandboxTools", "ToolLimits", "ToolResult"]
