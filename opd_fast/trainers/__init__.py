"""The training loop, and one file for each method that supplies its gradients."""
