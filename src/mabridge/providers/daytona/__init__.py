"""The ``daytona`` provider: sandboxes of Daytona, https://www.daytona.io/docs."""

from mabridge.providers.daytona.options import DaytonaOptions, DaytonaVolume
from mabridge.providers.daytona.provider import DaytonaProvider

__all__ = ["DaytonaOptions", "DaytonaProvider", "DaytonaVolume"]
