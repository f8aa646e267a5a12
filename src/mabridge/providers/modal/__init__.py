"""The ``modal`` provider: sandboxes of Modal, https://modal.com/docs/guide/sandboxes."""

from mabridge.providers.modal.options import ModalOptions
from mabridge.providers.modal.provider import ModalProvider

__all__ = ["ModalOptions", "ModalProvider"]
