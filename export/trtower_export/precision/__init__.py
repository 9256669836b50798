"""Measure what half precision and 8 bits do to a tower, and keep its error within bounds."""
