"""SimpleTuner behind the port. SimpleTuner is AGPL-3.0: it runs as a program of its own and is never imported here."""
