"""Plots how the gradient flows through a tanh RNN and a GRU, before and after training."""
