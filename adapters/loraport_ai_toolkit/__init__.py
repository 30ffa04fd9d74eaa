"""ai-toolkit behind the port: its YAML, its process, its results."""
