"""Techniques that make a round fast, one a file. They know no student and no method."""
