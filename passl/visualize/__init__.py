"""Pictures of runs and of what models see."""
