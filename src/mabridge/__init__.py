"""Run the tool calls of Claude Managed Agents on anyone's sandboxes, from outside the sandbox.

The names below are the public ones. They are loaded when first used, so that ``import mabridge`` costs next to
nothing: neither the Anthropic SDK nor any provider's is imported by it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mabridge._version import __version__

if TYPE_CHECKING:
    from mabridge.config import Config, ProviderConfig, load_config
    from mabridge.errors import (
        AtCapacity,
        ConfigError,
        CreateFailed,
        FileTooLarge,
        LeaseLost,
        MabridgeError,
        NotSupported,
        OutOfMemory,
        PluginError,
        SandboxError,
        SandboxGone,
        SandboxUnavailable,
    )
    from mabridge.hookspecs import hookimpl
    from mabridge.identity import sandbox_key, sandbox_labels
    from mabridge.observe import Event
    from mabridge.routing import Route
    from mabridge.sandbox import (
        EnvVar,
        ExecResult,
        Process,
        Provider,
        ProviderOptions,
        Sandbox,
        SandboxInfo,
        SandboxSpec,
        SupportsProcess,
        SupportsSuspend,
    )
    from mabridge.worker import Worker

_MODULE_OF = {
    name: module
    for module, names in {
        "mabridge.config": ("Config", "ProviderConfig", "load_config"),
        "mabridge.errors": (
            "AtCapacity",
            "ConfigError",
            "CreateFailed",
            "FileTooLarge",
            "LeaseLost",
            "MabridgeError",
            "NotSupported",
            "OutOfMemory",
            "PluginError",
            "SandboxError",
            "SandboxGone",
            "SandboxUnavailable",
        ),
        "mabridge.hookspecs": ("hookimpl",),
        "mabridge.identity": ("sandbox_key", "sandbox_labels"),
        "mabridge.observe": ("Event",),
        "mabridge.routing": ("Route",),
        "mabridge.sandbox": (
            "EnvVar",
            "ExecResult",
            "Process",
            "Provider",
            "ProviderOptions",
            "Sandbox",
            "SandboxInfo",
            "SandboxSpec",
            "SupportsProcess",
            "SupportsSuspend",
        ),
        "mabridge.worker": ("Worker",),
    }.items()
    for name in names
}

__all__ = [
    "AtCapacity",
    "Config",
    "ConfigError",
    "CreateFailed",
    "EnvVar",
    "Event",
    "ExecResult",
    "FileTooLarge",
    "LeaseLost",
    "MabridgeError",
    "NotSupported",
    "OutOfMemory",
    "PluginError",
    "Process",
    "Provider",
    "ProviderConfig",
    "ProviderOptions",
    "Route",
    "Sandbox",
    "SandboxError",
    "SandboxGone",
    "SandboxInfo",
    "SandboxSpec",
    "SandboxUnavailable",
    "SupportsProcess",
    "SupportsSuspend",
    "Worker",
    "__version__",
    "hookimpl",
    "load_config",
    "sandbox_key",
    "sandbox_labels",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - it returns whatever the name stands for
    try:
        module = _MODULE_OF[name]
    except KeyError:
        raise AttributeError(f"module 'mabridge' has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
