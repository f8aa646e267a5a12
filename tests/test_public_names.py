"""The public names are these, each can be had, and importing mabridge costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import mabridge

NAMES = """
    AtCapacity Config ConfigError CreateFailed EnvVar Event ExecResult FileTooLarge LeaseLost MabridgeError NotSupported
    OutOfMemory PluginError Process Provider ProviderConfig ProviderOptions Route Sandbox SandboxError SandboxGone
    SandboxInfo SandboxSpec SandboxUnavailable SupportsProcess SupportsSuspend Worker __version__ hookimpl load_config
    sandbox_key sandbox_labels
"""


def test_public_names_are_pinned_and_can_all_be_had():
    assert sorted(mabridge.__all__) == sorted(NAMES.split())
    assert dir(mabridge) == sorted(mabridge.__all__)
    assert all(getattr(mabridge, name) is not None for name in mabridge.__all__)


def test_importing_mabridge_loads_no_sdk():
    program = (
        "import sys, mabridge, mabridge.plugins; mabridge.plugins.registry();"
        "print([m for m in ('anthropic', 'aiodocker', 'aiohttp', 'httpx2', 'starlette') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_key_is_a_legal_name_everywhere_and_the_same_for_the_same_session():
    key = mabridge.sandbox_key("env_1", "sesn_1")
    assert key == "maba4k46cjnocsqbypuj2hv6hed"  # pinned: another key would lose every sandbox that there is
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz234567")
    assert key != mabridge.sandbox_key("env_1", "sesn_2") != mabridge.sandbox_key("env_2", "sesn_1")
    labels = mabridge.sandbox_labels("env_1", "sesn_1")
    assert labels == {"mabridge.key": key, "mabridge.environment": "env_1", "mabridge.session": "sesn_1"}
