"""Server of trained models with OpenAI's chat protocol, on Ray Serve."""
