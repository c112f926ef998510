"""Operators, and the primitives that they are made of."""
