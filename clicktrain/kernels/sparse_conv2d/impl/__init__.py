"""Implementations of one operator; they do not know each other."""
