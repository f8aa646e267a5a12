"""The conformance kit: the contract of `mabridge.sandbox`, as tests that a provider's author inherits.

::

    class TestAcme(SandboxConformance):
        @pytest.fixture(scope="class")
        async def provider(self):
            async with AcmeProvider(AcmeOptions(region="eu")) as provider:
                yield provider

Needs pytest: ``pip install 'mabridge[testing]'``. `helpers` is for tests of a provider's own.
"""

from __future__ import annotations

from mabridge.testing.conformance.helpers import created, find, living, new_key, new_spec, run, sh, wait_for_file
from mabridge.testing.conformance.kit import SandboxConformance

__all__ = ["SandboxConformance", "created", "find", "living", "new_key", "new_spec", "run", "sh", "wait_for_file"]
