"""The ``docker`` provider: a hardened container for each sandbox, on any Docker engine."""

from mabridge.providers.docker.options import DockerMount, DockerOptions
from mabridge.providers.docker.provider import DockerProvider

__all__ = ["DockerMount", "DockerOptions", "DockerProvider"]
