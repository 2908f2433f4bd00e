"""One training stage on Ray Train and DeepSpeed: driver, workers, checkpoints, records of each step."""
