"""What samples tell of each weight: the inner products of its inputs, and its gradients."""
