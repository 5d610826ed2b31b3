"""The public calls, by what they work on: tensors, checkpoints, adapters."""
