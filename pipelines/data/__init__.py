"""Samples: records to WebDataset shards, their index, the order of samples, and their way to the workers."""
