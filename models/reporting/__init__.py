"""Stored results as one page: HTML or Markdown."""
