"""Compares the equations of five documents on the GRU, printed and corrected, with autodiff."""
