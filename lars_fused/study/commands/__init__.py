"""The commands of `lars-study`."""
