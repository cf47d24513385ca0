"""What is wrong with a run, and which setting to change."""
