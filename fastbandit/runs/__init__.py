"""Runs: their folders, how they begin and go on, what they cost, how their progress is shown."""
