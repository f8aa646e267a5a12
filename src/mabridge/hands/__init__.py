"""One agent's hands inside one sandbox: shells that outlive the worker, and a journal of what they did."""

from mabridge.hands.hands import CallResult, Hands

__all__ = ["CallResult", "Hands"]
