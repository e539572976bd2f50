"""Activation ranges, INT8 recipes and the accuracy report of a bundle."""
