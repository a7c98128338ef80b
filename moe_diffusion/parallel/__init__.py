"""Where arrays live: the device mesh, the sharding presets, clusters of processes."""
