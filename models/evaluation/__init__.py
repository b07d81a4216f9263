"""Asks a model every question of a benchmark and scores the answers."""
