"""The experiments: what they run, as plain data, and what they make of the finished runs."""
