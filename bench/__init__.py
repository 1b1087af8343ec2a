"""Measurements: model shapes, peers, the traffic model, and the records that they leave."""
