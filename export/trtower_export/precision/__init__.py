"""What half precision and 8 bits do to a tower, and what is done about it."""
