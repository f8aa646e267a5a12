"""The conversation with Anthropic: the work queue, the lease, a session's events, and what to do about them."""
