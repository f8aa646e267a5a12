"""What adapters share, for those who write one: commands, files and processes, told to a ``/bin/sh`` in the sandbox.

A provider whose sandboxes have ``/bin/sh`` and can run a command gets its files, and the killing of what a command has
started, from `read_file`, `write_file`, `run_argv` and `kill_argv`. One whose commands are processes of this machine
also gets bounds on time and output, from `communicate`.
"""

from __future__ import annotations

from mabridge.providers._env import SandboxEnv, read_env
from mabridge.providers._shell import (
    MARKER,
    Capture,
    check_env,
    kill_argv,
    read_file,
    run_argv,
    with_sized_stdin,
    write_file,
)
from mabridge.providers._subprocess import HeldProcess, communicate, kill_marked

__all__ = [
    "MARKER",
    "Capture",
    "HeldProcess",
    "SandboxEnv",
    "check_env",
    "communicate",
    "kill_argv",
    "kill_marked",
    "read_env",
    "read_file",
    "run_argv",
    "with_sized_stdin",
    "write_file",
]
