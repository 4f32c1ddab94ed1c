"""The formats of backbone weights: how each is recognised, named and converted."""
