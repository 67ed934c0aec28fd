"""From images and instructions to the cache: the frozen encoders run once over a dataset."""
