"""Trees become gradients."""
