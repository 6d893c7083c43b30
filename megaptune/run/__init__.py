"""What surrounds a run: ranks, its directory, checkpoints, stopping, monitoring."""
