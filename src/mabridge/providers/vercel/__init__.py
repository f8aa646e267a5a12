"""The ``vercel`` provider: Vercel Sandboxes, which are Firecracker microVMs (https://vercel.com/docs/sandbox)."""

from __future__ import annotations

from mabridge.providers.vercel.options import VercelOptions
from mabridge.providers.vercel.provider import VercelProvider

__all__ = ["VercelOptions", "VercelProvider"]
