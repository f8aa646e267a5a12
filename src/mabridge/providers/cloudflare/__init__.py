"""The ``cloudflare`` provider: containers behind a Worker that runs Cloudflare's own bridge.

There is no Python SDK; the bridge speaks HTTP (https://developers.cloudflare.com/sandbox/bridge/). It has no stdin, no
variables, no bytes that are not UTF-8 and no end of a command whose caller went away. So each command runs under a
script of ours, which has all of these, and one request does for it.

The Worker of ``examples/cloudflare`` adds a register of sandboxes to the bridge, without which a sandbox can be neither
listed, nor looked for without being started, nor given a time to live.
"""

from __future__ import annotations

from mabridge.providers.cloudflare.options import CloudflareOptions
from mabridge.providers.cloudflare.provider import CloudflareProvider
from mabridge.providers.cloudflare.sandbox import CloudflareSandbox

__all__ = ["CloudflareOptions", "CloudflareProvider", "CloudflareSandbox"]
