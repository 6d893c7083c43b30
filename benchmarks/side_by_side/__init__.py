"""The parts of ``benchmarks/speed.py``: what is computed, by whom, how it is timed, counted and shown."""
