"""What the config files of one model family share."""
