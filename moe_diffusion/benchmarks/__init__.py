"""What dispatch, training steps and samplers cost, measured in ratios and medians of one run."""
