"""What the promises are tried on: the served application, its organizations, and the calls of all its operations."""

from tests.gateway.conftest import base_url, payer, priced

__all__ = ["base_url", "payer", "priced"]
