"""The providers that come with mabridge, registered as any plugin registers its own; imported when first used."""

from __future__ import annotations

from mabridge.hookspecs import RegisterProvider, hookimpl


@hookimpl
def mabridge_register_providers(register: RegisterProvider) -> None:
    """Register them."""
    register("mabridge.providers.local:LocalProvider", name="local")
    register("mabridge.providers.docker:DockerProvider", name="docker", sdk="aiodocker", install="mabridge[docker]")
    register("mabridge.providers.modal:ModalProvider", name="modal", sdk="modal", install="mabridge[modal]")
    register("mabridge.providers.e2b:E2BProvider", name="e2b", sdk="e2b", install="mabridge[e2b]")
    register("mabridge.providers.daytona:DaytonaProvider", name="daytona", sdk="daytona", install="mabridge[daytona]")
    register("mabridge.providers.cloudflare:CloudflareProvider", name="cloudflare")
    register(
        "mabridge.providers.vercel:VercelProvider", name="vercel", sdk="vercel.sandbox", install="mabridge[vercel]"
    )
