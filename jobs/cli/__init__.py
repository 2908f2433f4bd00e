"""The verbs of the command line, one module per group. Each module adds its parsers and holds its handlers."""
