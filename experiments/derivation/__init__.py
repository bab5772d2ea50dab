"""The equations of five documents on the GRU, each as printed and as corrected, beside autodiff."""
