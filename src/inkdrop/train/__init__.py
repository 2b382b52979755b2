"""Training: the loop, the moving average of the weights, and the state that resuming needs."""
