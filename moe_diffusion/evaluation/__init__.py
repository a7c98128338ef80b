"""Pictures and numbers that say how good the samples are."""
