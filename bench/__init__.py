"""Benchmarks: model shapes, peers, the traffic model, and the files they write."""
