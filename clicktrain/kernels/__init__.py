"""Operators on packed weights, and putting them into models."""
