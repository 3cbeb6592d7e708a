"""The daemon: HTTP in, verdicts and metrics out."""
