"""Gradients on their way from backward to the step: clipped, accumulated, or used up as they arrive."""
