"""Whether this process may hold as many files and connections open as its sessions need."""

from __future__ import annotations

import logging
import os

from mabridge.errors import ConfigError

__all__ = ["bound_open_files"]

_log = logging.getLogger(__name__)

# The event stream, a heartbeat or a result on its way, a channel into the sandbox for each of a few shells, and slack.
_A_SESSION = 8
_BESIDES = 64


def bound_open_files(sessions: int) -> None:
    """Raise the limit on open files of this process as far as `sessions` need it and the system allows.

    Raises:
        ConfigError: the system does not allow it: a worker that runs out of them breaks sessions at random.
    """
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = sessions * _A_SESSION + _BESIDES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{sessions} sessions need {needed} open files, and this process may have {hard}: raise the limit "
            f"(ulimit -n, LimitNOFILE), or lower max_sessions to {max((hard - _BESIDES) // _A_SESSION, 1)}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    _log.info("the limit on open files was raised from %d to %d", soft, needed)
