"""Recipes, teachers, the loop and its checkpoints."""
