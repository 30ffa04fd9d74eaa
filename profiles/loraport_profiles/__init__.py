"""The built-in profiles, as YAML files: one folder a kind."""
