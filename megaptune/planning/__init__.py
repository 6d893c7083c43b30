"""What a layout needs before it is tried: bytes per rank, bytes sent, and which layout to take."""
