"""Answers of a trained model to benchmark questions, and their scores."""
