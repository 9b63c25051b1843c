"""The step: the loop, the methods, the one pass, student and teachers."""
