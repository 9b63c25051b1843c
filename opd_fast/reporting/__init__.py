"""What a run leaves for people: metrics, curves, tables, pictures, the report."""
