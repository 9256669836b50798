"""A bundle in a loaded model: found, compared, put in the place of the tower, and taken out again."""
