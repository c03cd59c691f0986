"""What a model costs, since when, and what that comes to for one request."""
