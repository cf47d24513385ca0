"""The engine: builds everything from a checked configuration, trains, evaluates, saves and resumes."""
