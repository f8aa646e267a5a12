"""Loopback stand-ins for vendors' services: the vendor's own SDK is the client, and commands really run."""
