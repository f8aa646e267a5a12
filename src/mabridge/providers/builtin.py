"""The providers that come with mabridge, registered as any plugin registers its own; imported when first used."""

from __future__ import annotations

from mabridge.hookspecs import RegisterProvider, hookimpl


@hookimpl
def mabridge_register_providers(register: RegisterProvider) -> None:
    """Register them."""
    register("mabridge.providers.local:LocalProvider", name="local")
    register("mabridge.providers.docker:DockerProvider", name="docker", sdk="aiodocker", install="mabridge[docker]")
