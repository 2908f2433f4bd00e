"""Values and the command line: job files, their one schema, and `redux …`. May import pipelines and redux."""
