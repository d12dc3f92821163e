"""Predict how much memory training will need, before it starts."""
