"""Bursar: a treasurer for a company's AI usage.

One folder per capability; imports point downwards (pyproject.toml, tool.importlinter).
"""

__version__ = "0.1.0"
