"""A restriction of the network that is asked for holds, or is refused."""

from __future__ import annotations

import pytest

from mabridge.errors import ConfigError, NotSupported
from mabridge.sandbox import Provider
from mabridge.testing.conformance.helpers import created, new_spec, run, sh

__all__ = ["EgressTests"]

# $1 host, $2 port. Ends with 0 if a connection was made, 3 if none was, 4 if there is nothing to try with.
_CONNECT = r"""
tried=
has() { command -v "$1" >/dev/null 2>&1 && tried=1; }
soon=
command -v timeout >/dev/null 2>&1 && soon='timeout 10'
if has bash && $soon bash -c 'exec 3<>"/dev/tcp/$1/$2"' bash "$1" "$2"; then exit 0; fi
if has python3 && python3 -c 'import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)' \
    "$1" "$2"; then exit 0; fi
if nc --help 2>&1 | grep -q BusyBox && has nc && $soon nc -w 5 "$1" "$2" -e true; then exit 0; fi
if has wget && $soon wget -T 5 -t 1 -O - "http://$1:$2/" 2>&1 | grep -qi 'connected\|saved\|response\|returned'; then
    exit 0
fi
[ -n "$tried" ] && exit 3
exit 4
"""


class EgressTests:
    """The network, as the sandbox sees it."""

    async def test_egress_that_was_forbidden_is_impossible_or_refused(
        self, no_egress: Provider, egress_target: tuple[str, int]
    ) -> None:
        async with no_egress as provider:
            try:
                async with created(provider, new_spec()) as sandbox:
                    host, port = egress_target
                    result = await sh(sandbox, _CONNECT, host, str(port), timeout=90)
                    variables = (await run(sandbox, "env")).stdout
            except (NotSupported, ConfigError):
                return  # refused, which is honest
        if result.exit_code == 4:
            pytest.skip("the image has nothing to connect with (bash, python3, nc or wget)")
        assert result.exit_code == 3, "the network was reached, though it is forbidden"
        assert b"_PROXY=" not in variables.upper(), "a proxy is offered, though the network is forbidden"

    async def test_egress_that_was_allowed_is_possible(
        self, open_egress: Provider, egress_target: tuple[str, int]
    ) -> None:
        """Without this, a target that nobody can reach would prove the other test."""
        async with open_egress as provider, created(provider, new_spec()) as sandbox:
            result = await sh(sandbox, _CONNECT, egress_target[0], str(egress_target[1]), timeout=90)
        if result.exit_code == 4:
            pytest.skip("the image has nothing to connect with (bash, python3, nc or wget)")
        assert result.exit_code == 0, result.stderr.decode(errors="replace")
