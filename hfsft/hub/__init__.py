"""The Hub: what exists there, and pushing to it with timeouts and retries."""
