"""One file a command of `python -m integrations.llava`; the only place that reads arguments and prints."""
