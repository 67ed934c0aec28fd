"""From the cache to a trained pipeline: only the UNet runs."""
