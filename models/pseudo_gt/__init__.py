"""Stage 1: writes the answers that a student learns from."""
