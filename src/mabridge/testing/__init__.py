"""What ships for tests: `ControlPlane`, a local Managed Agents platform, and `SandboxConformance`, a provider's tests.

The one needs Starlette and uvicorn, the other pytest: ``pip install 'mabridge[testing]'``. The names are loaded when
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mabridge.testing.brain import Agent, Brain
    from mabridge.testing.calls import Call, Reply, Results, ToolCall
    from mabridge.testing.conformance import SandboxConformance
    from mabridge.testing.faults import Fault, RequestRecord
    from mabridge.testing.plane import ControlPlane, Environment
    from mabridge.testing.session import BrainFailed, Session
    from mabridge.testing.wire import ApiError

_MODULE_OF = {
    "Agent": "brain",
    "ApiError": "wire",
    "Brain": "brain",
    "BrainFailed": "session",
    "Call": "calls",
    "ControlPlane": "plane",
    "Environment": "plane",
    "Fault": "faults",
    "Reply": "calls",
    "RequestRecord": "faults",
    "Results": "calls",
    "SandboxConformance": "conformance",
    "Session": "session",
    "ToolCall": "calls",
}

__all__ = [
    "Agent",
    "ApiError",
    "Brain",
    "BrainFailed",
    "Call",
    "ControlPlane",
    "Environment",
    "Fault",
    "Reply",
    "RequestRecord",
    "Results",
    "SandboxConformance",
    "Session",
    "ToolCall",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - it returns whatever the name stands for
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mabridge.testing' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"mabridge.testing.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("pytest", "starlette", "uvicorn"):
            raise
        raise ImportError(
            f"mabridge.testing.{name} needs {error.name}: pip install 'mabridge[testing]'", name=error.name
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
