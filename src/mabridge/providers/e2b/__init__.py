"""The ``e2b`` provider: sandboxes of E2B (https://e2b.dev), through its own SDK.

E2B runs one string of bash, gives its output back as text, kills no more than bash itself, and waits for whatever holds
the output. So a command is wrapped, see `wrapper`: one request carries it there and its exact, bounded output back.
"""

from __future__ import annotations

from mabridge.providers.e2b.options import E2BNetwork, E2BOptions
from mabridge.providers.e2b.provider import E2BProvider

__all__ = ["E2BNetwork", "E2BOptions", "E2BProvider"]
