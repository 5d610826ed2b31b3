"""What a model's code does with parameters, operation by operation."""
