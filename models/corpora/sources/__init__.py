"""Recordings and voices by package: what they hold and how they are read."""
