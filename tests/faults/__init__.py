"""What is killed, stopped, emptied or forged in the middle of a run, and what must be true afterwards."""
