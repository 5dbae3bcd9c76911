"""From a suite's images to batches: the data module, its loaders and the proxy images."""
