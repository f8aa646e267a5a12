"""An emulated Vercel Sandbox API, in which commands really run.

Routes and bodies were read in ``vercel-sandbox`` 0.10 (``_internal/api_client.py``); what a stop, a resume, tags and
the time limit mean at https://vercel.com/docs/sandbox. Where the service's way is not known, this takes the one that
hurts: a command's stream ends only when nothing holds its output any more, a kill reaches the leader alone, and text
that is no UTF-8 is replaced chunk by chunk.
"""

from __future__ import annotations

from tests.emulators.vercel.server import VercelEmulator
from tests.emulators.vercel.state import PROJECT, TEAM, TOKEN

__all__ = ["PROJECT", "TEAM", "TOKEN", "VercelEmulator"]
