"""Sources of labelled images and the grain pipeline that batches them."""
