"""Does a run fit, what does it cost: programs compiled for accelerators that need not be there."""
