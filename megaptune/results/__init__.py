"""What a run leaves for a reader: the table of its results."""
