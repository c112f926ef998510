"""Operators: convolution with a kernel for every sample, and KernelWarehouse on top of it."""
